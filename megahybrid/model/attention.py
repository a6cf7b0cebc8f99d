"""One layer's attention between its projections: norm, rotation, score scale, `attend`."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from megahybrid.config.attention import AttentionScheme, Rope
from megahybrid.config.model import ModelConfig
from megahybrid.model.context import SequenceContext
from megahybrid.model.core_attention import attended, mix
from megahybrid.model.norm import QKNormModule
from megahybrid.model.rotary import RotaryTable, rotate_both
from megahybrid.model.score_scale import QueryScale
from megahybrid.parallel.linear import ColumnParallelLinear, Output, RowParallelLinear
from megahybrid.parallel.mesh import Axis, ParallelMesh

Places = tuple[RotaryTable | None, Tensor | None]  # the rotation, and a factor of each query


def kv_rows(config: ModelConfig, tensor: Axis) -> tuple[int, int] | None:
    """Rows of a replicated key or value weight that this rank uses; None where they are sharded.

    With more tensor ranks than KV heads the weights are replicated and each rank reads the one
    head that its queries share: shards held by sub-groups would be marked wrongly, because
    DeepSpeed's mark is binary.
    """
    if tensor.size <= config.num_kv_heads:
        return None
    head = tensor.rank * config.num_kv_heads // tensor.size
    return head * config.head_dim, (head + 1) * config.head_dim


def attention_outputs(name: str, config: ModelConfig, mesh: ParallelMesh) -> tuple[Output, ...]:
    """Query, key and value, for a column-parallel matrix that may hold others as well."""
    kv_features = config.num_kv_heads * config.head_dim
    keep = kv_rows(config, mesh.tensor)
    return (
        Output(f"{name}.query.weight", config.num_heads * config.head_dim),
        Output(f"{name}.key.weight", kv_features, sharded=keep is None, keep=keep),
        Output(f"{name}.value.weight", kv_features, sharded=keep is None, keep=keep),
    )


class Attention(nn.Module):
    """What an `AttentionScheme` says, on this rank's heads, and the way back to hidden size."""

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        scheme: AttentionScheme,
        mesh: ParallelMesh,
        kernel: str,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.head_dim = config.head_dim
        self.kernel = kernel
        # A compiled `rotate_both`; None: as `mix` does it.
        self.turn: Callable[..., tuple[Tensor, Tensor]] | None = None
        heads = (config.num_heads, config.num_kv_heads)
        self.qk_norm = (
            None
            if scheme.qk_norm.kind == "none"
            else QKNormModule(scheme.qk_norm, *heads, config.head_dim, name, mesh, config.eps)
        )
        self.query_scale = QueryScale.of(scheme, config.num_heads, name, mesh)
        self.output = RowParallelLinear(
            config.num_heads * config.head_dim, config.hidden_size, f"{name}.output.weight", mesh
        )

    def adopt(self, scheme: AttentionScheme, kernel: str) -> None:
        """See as `scheme` says from the next forward on; its learned parameters are the same."""
        assert scheme.learned() == self.scheme.learned()
        self.scheme, self.kernel = scheme, kernel
        if self.query_scale is not None:
            assert type(scheme.score_scale) is type(self.query_scale.scale)
            self.query_scale.scale = scheme.score_scale
            self.query_scale.window = scheme.window

    def heads(
        self,
        query: Float[Tensor, "seq batch query_features_local"],
        key: Float[Tensor, "seq batch kv_features_local"],
        value: Float[Tensor, "seq batch kv_features_local"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [seq, batch, heads, head_dim], normalised where the scheme says so."""
        q = query.unflatten(-1, (-1, self.head_dim))  # [seq, batch, heads_local, head_dim]
        k = key.unflatten(-1, (-1, self.head_dim))  # [seq, batch, kv_heads_local, head_dim]
        v = value.unflatten(-1, (-1, self.head_dim))
        if self.qk_norm is not None:
            q, k = self.qk_norm(q, k)
        return q, k, v

    def forward(
        self,
        q: Float[Tensor, "seq batch heads_local head_dim"],
        k: Float[Tensor, "seq batch kv_heads_local head_dim"],
        v: Float[Tensor, "seq batch kv_heads_local head_dim"],
        context: SequenceContext,
    ) -> Float[Tensor, "seq batch heads_local head_dim"]:
        """The mixed values of heads that are normalised but not yet placed."""
        position = self.scheme.position
        if self.turn is not None and context.mixing is None and torch.is_grad_enabled():
            if isinstance(position, Rope):
                q, k = self.turn(q, k, context.rotary_table(position, self.head_dim))
            if self.query_scale is not None:
                q = self.query_scale(q, context.documents, context.length)
            return self.attended(q, k, v, context)
        return (context.mixing or mix)(
            q,
            k,
            v,
            scheme=self.scheme,
            kernel=self.kernel,
            context=context,
            query_scale=self.query_scale,
        )

    def places(self, context: SequenceContext) -> Places:
        """What `placed` turns and scales this batch's heads by, [batch, seq, ...]."""
        position = self.scheme.position
        table = None
        if isinstance(position, Rope):
            table = context.rotary_table(position, self.head_dim).rows_first()
        factor = None
        if self.query_scale is not None:
            factor = self.query_scale.factor(context.documents, context.length, context.device).T
        return table, factor

    def placed(self, q: Tensor, k: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """q and k turned to their positions and q scaled, from what is made already: a compiled
        region can make no table. `mix` does the same from a context."""
        table, factor = places
        if table is not None:
            q, k = rotate_both(q, k, table)
        if self.query_scale is not None and factor is not None:
            q = self.query_scale.scaled(q, factor)
        return q, k

    def attended(
        self, q: Tensor, k: Tensor, v: Tensor, context: SequenceContext
    ) -> Float[Tensor, "seq batch heads_local head_dim"]:
        """The mixed values of heads that are placed already."""
        return attended(q, k, v, scheme=self.scheme, kernel=self.kernel, context=context)


def query_key_value(name: str, config: ModelConfig, mesh: ParallelMesh) -> ColumnParallelLinear:
    """The input projections of attention alone (the parallel block has one for all five)."""
    return ColumnParallelLinear(config.hidden_size, attention_outputs(name, config, mesh), mesh)
