"""One layer's attention between its projections: norm, rotation, temperature, core attention."""

from collections.abc import Callable
from typing import NamedTuple, assert_never

import torch
from jaxtyping import Float
from torch import Tensor, nn

from megahybrid.config.attention import (
    AttentionScheme,
    Nope,
    Rope,
    biased_projections,
)
from megahybrid.config.model import ModelConfig
from megahybrid.model.context import SequenceContext
from megahybrid.model.context_attention import ShardedCall, attend_sharded
from megahybrid.model.core_attention import prepare_queries_keys
from megahybrid.model.kernels import AttentionSpec
from megahybrid.model.learned_sinks import LearnedSinks
from megahybrid.model.norm import QKNormModule
from megahybrid.model.output_gate import gated_output
from megahybrid.model.projection_bias import ProjectionBiases
from megahybrid.model.rotary import RotaryTable
from megahybrid.model.score_scale import QueryScale, score_scale
from megahybrid.parallel.linear import Output, RowParallelLinear
from megahybrid.parallel.mesh import Axis, ParallelMesh


class Heads(NamedTuple):
    """Queries, keys and values of attention: [seq, batch, heads_local, head_dim]."""

    query: Tensor
    key: Tensor
    value: Tensor


class BranchInputs(NamedTuple):
    """The inputs that the second half of a layer reads beside the attention output: one field for
    each output of the input projection that is not heads; None where a block has none.

    Of the MLP it is gate and up, or their product, or all that the MLP made of them.
    """

    output_gate: Tensor | None = None  # of the attention output, before the sigmoid
    fuse_gate: Tensor | None = None  # of two views of the keys, before bias and sigmoid
    gate: Tensor | None = None
    up: Tensor | None = None
    gated: Tensor | None = None  # activation(gate) * up
    mlp: Tensor | None = None  # this rank's part of the MLP's sum


class Positions(NamedTuple):
    """What a batch's positions are to a layer, made on the way in: a compiled region can make no
    table. Leading axes are [seq, batch], or [batch, seq] after `rows_first`."""

    table: RotaryTable | None  # of the rotation
    factor: Tensor | None  # [seq, batch or 1]: each query's temperature, without what is learned

    def rows_first(self) -> "Positions":
        """Return the same for heads that are [batch, seq, ...]."""
        return Positions(
            None if self.table is None else self.table.rows_first(),
            None if self.factor is None else self.factor.T,
        )


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


def attention_outputs(
    name: str, config: ModelConfig, scheme: AttentionScheme, mesh: ParallelMesh
) -> dict[str, Output]:
    """Return the input projections of attention, for a matrix that may hold others as well.

    What is neither query, key nor value is found in `BranchInputs`, under the same name.
    """
    kv_features = config.num_kv_heads * config.head_dim
    keep = kv_rows(config, mesh.tensor)
    outputs = {
        "query": Output(f"{name}.query.weight", config.num_heads * config.head_dim),
        "key": Output(f"{name}.key.weight", kv_features, sharded=keep is None, keep=keep),
        "value": Output(f"{name}.value.weight", kv_features, sharded=keep is None, keep=keep),
    }
    # One value a head leaves the fused product, and all that lies behind, a width that is no
    # multiple of eight: on CPUs products then take an eighth longer, tensor cores want it as well.
    filler = -(config.num_heads // mesh.tensor.size) % PRODUCT_MULTIPLE
    gates = scheme.token_gates(config.num_heads, config.num_kv_heads, config.head_dim)
    for gate, shape in gates.items():
        more = filler if shape.values == config.num_heads else 0
        outputs[gate] = Output(f"{name}.{gate}.weight", shape.values, filler=more)
    return outputs


PRODUCT_MULTIPLE = 8


class Attention(nn.Module):
    """An `AttentionScheme` on this rank's heads, and the way back to hidden size."""

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
        # `prepare_queries_keys` through a compiler.
        self.compiled_prepare: Callable[..., tuple[Tensor, Tensor]] | None = None
        heads = (config.num_heads, config.num_kv_heads)
        self.qk_norm = (
            None
            if scheme.qk_norm.kind == "none"
            else QKNormModule(scheme.qk_norm, *heads, config.head_dim, name, mesh, config.eps)
        )
        self.biases = (
            ProjectionBiases(*heads, config.head_dim, name, mesh)
            if biased_projections(scheme.bias)
            else None
        )
        self.sinks = LearnedSinks(config.num_heads, name, mesh) if scheme.sink else None
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
            self.query_scale.window, self.query_scale.chunk = scheme.window, scheme.chunk

    def heads(
        self,
        query: Float[Tensor, "seq batch query_features_local"],
        key: Float[Tensor, "seq batch kv_features_local"],
        value: Float[Tensor, "seq batch kv_features_local"],
    ) -> Heads:
        """q, k and v [seq, batch, heads, head_dim], with biases and normalised where the scheme
        says so."""
        if self.biases is not None:
            query, key, value = self.biases(query, key, value)
        q = query.unflatten(-1, (-1, self.head_dim))  # [seq, batch, heads_local, head_dim]
        k = key.unflatten(-1, (-1, self.head_dim))  # [seq, batch, kv_heads_local, head_dim]
        v = value.unflatten(-1, (-1, self.head_dim))
        if self.qk_norm is not None:
            q, k = self.qk_norm(q, k)
        return Heads(q, k, v)

    def forward(
        self,
        q: Float[Tensor, "seq batch heads_local head_dim"],
        k: Float[Tensor, "seq batch kv_heads_local head_dim"],
        v: Float[Tensor, "seq batch kv_heads_local head_dim"],
        context: SequenceContext,
        fuse_gate: Tensor | None = None,
    ) -> Float[Tensor, "seq batch heads_local head_dim"]:
        """The attention output of heads that are normalised but not yet prepared."""
        q, k = self.prepared(q, k, self.positions(context))
        return self.attended(q, k, v, context, fuse_gate)

    def positions(self, context: SequenceContext) -> Positions:
        """Return what `prepared` rotates and scales this batch's heads by."""
        table, factor = None, None
        match self.scheme.position:
            case Rope() as rope:
                table = context.rotary_table(rope, self.head_dim)
            case Nope():
                pass
            case other:
                assert_never(other)
        if self.query_scale is not None:
            whole = self.query_scale.factor(context.documents, context.length, context.device)
            factor = context.local(whole)
        return Positions(table, factor)

    def prepared(self, q: Tensor, k: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Return q and k rotated to their positions and q times its temperature."""
        table, factor = positions
        if self.query_scale is not None and factor is not None:
            factor = self.query_scale(factor)
        # A temperature without a rotation is one product: a kernel as it is.
        if (
            self.compiled_prepare is not None
            and table is not None
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        ):
            return self.compiled_prepare(q, k, table, factor)
        return prepare_queries_keys(q, k, table, factor)

    def attended(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: SequenceContext,
        fuse_gate: Tensor | None = None,
    ) -> Float[Tensor, "seq batch heads_local head_dim"]:
        """The attention output of heads that are prepared; `fuse_gate` is for `TwoViews`."""
        spec = self.spec(context, batch=q.shape[1])
        if context.watch is not None:
            context.watch(q, k, spec)
        if context.shards is None:
            return context.attention(q, k, v, spec, self.kernel)
        shards, whole = context.shards, context.attention
        return attend_sharded(q, k, v, ShardedCall(shards, spec, self.kernel, whole))

    def to_hidden(
        self,
        attention_output: Float[Tensor, "seq batch heads_local head_dim"],
        inputs: BranchInputs,
        reduce: bool = True,
    ) -> Float[Tensor, "seq_out batch hidden"]:
        """The attention output on the stream's width: a shard of the sum, or with reduce=False
        this rank's part of it. `inputs` are those of this layer, for what acts on heads."""
        return self.output(self.gated(attention_output, inputs).flatten(-2), reduce=reduce)

    def gated(
        self,
        attention_output: Float[Tensor, "seq batch heads_local head_dim"],
        inputs: BranchInputs,
    ) -> Float[Tensor, "seq batch heads_local head_dim"]:
        """The attention output times the sigmoid of the layer's gate; as it is without one."""
        match self.scheme.gate:
            case "none":
                return attention_output
            case "head" | "element":
                assert inputs.output_gate is not None
                return gated_output(attention_output, inputs.output_gate)
            case other:
                assert_never(other)

    def spec(self, context: SequenceContext, batch: int) -> AttentionSpec:
        """Return what this layer asks of a kernel for a batch of so many rows. A chunk is a window
        of its length over documents that are cut so: every kernel that serves both serves it."""
        return AttentionSpec(
            window=self.scheme.reach,
            documents=context.documents_of(self.scheme.chunk, batch),
            scale=score_scale(self.scheme, self.head_dim),
            sinks=None if self.sinks is None else self.sinks(),
        )
