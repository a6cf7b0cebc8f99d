"""Scales of the logits that depend on the query: factors that multiply q before attend()."""

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

from megahybrid.config.attention import AttentionScheme, Llama4Scale, LogScale, SsmaxScale
from megahybrid.model.kernels.documents import Documents
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.parallel.sharding import Segment, ShardSpec, mark

PositionScale = Llama4Scale | LogScale | SsmaxScale


def query_factor(
    scale: PositionScale,
    window: int | None,
    documents: Documents | None,
    length: int,
    device: torch.device,
) -> Float[Tensor, "seq batch"]:
    """The factor of each query, fp32; ssmax's learned s is not in it. batch 1: alike in all rows.

    llama4 counts the position p within the document, 1 + c ln(1 + floor((p + 1) / floor)); log and
    ssmax count the n keys the query sees, at most `window`: log_a(a + n) and ln n.
    """
    if documents is None:
        position = torch.arange(length, device=device)[:, None]
        keys = position + 1 if window is None else (position + 1).clamp(max=window)
    else:
        position, keys = documents.positions().T, documents.visible_keys(window).T
    if isinstance(scale, Llama4Scale):
        steps = (position + 1) // scale.floor
        return 1 + scale.coefficient * torch.log1p(steps.float())
    if isinstance(scale, LogScale):
        # The quotient of two fp32 logarithms: a base given as a number has no rounding of its own.
        return torch.log(scale.base + keys.float()) / torch.log(torch.tensor(float(scale.base)))
    return torch.log(keys.float())


@lru_cache(maxsize=8)
def _plain_factor(
    scale: PositionScale, window: int | None, length: int, device: torch.device
) -> Tensor:
    """That of rows of one document: the same for every batch."""
    return query_factor(scale, window, None, length, device)


class QueryScale(nn.Module):
    """Multiplies queries by `query_factor`, and for ssmax by a learned s per head."""

    def __init__(
        self,
        scale: PositionScale,
        window: int | None,
        num_heads: int,
        name: str,
        mesh: ParallelMesh,
    ) -> None:
        super().__init__()
        self.scale, self.window = scale, window
        self.logit_scale: nn.Parameter | None = None
        if isinstance(scale, SsmaxScale):
            segment = Segment(f"{name}.logit_scale", (num_heads,), 0)
            spec = ShardSpec((segment,), mesh.tensor.size, mesh.tensor.rank)
            initial = torch.full(spec.parameter_shape, scale.initial, device=mesh.device)
            self.logit_scale = mark(nn.Parameter(initial), spec)

    @classmethod
    def of(
        cls, scheme: AttentionScheme, num_heads: int, name: str, mesh: ParallelMesh
    ) -> "QueryScale | None":
        """The module of a scheme; None where the scale is the same for every query.

        `name` is the layer's attention, for example blocks.3.attention.
        """
        if isinstance(scheme.score_scale, PositionScale):
            return cls(scheme.score_scale, scheme.window, num_heads, name, mesh)
        return None

    def factor(
        self, documents: Documents | None, length: int, device: torch.device
    ) -> Float[Tensor, "seq batch"]:
        """`query_factor` of a batch, made once for all layers of the same scale and window."""
        if documents is None:
            return _plain_factor(self.scale, self.window, length, device)
        return documents.keep(
            ("query_factor", self.scale, self.window),
            lambda: query_factor(self.scale, self.window, documents, length, device),
        )

    def forward(
        self,
        q: Float[Tensor, "seq batch heads_local head_dim"],
        documents: Documents | None,
        length: int,
    ) -> Float[Tensor, "seq batch heads_local head_dim"]:
        """The scaled queries."""
        return self.scaled(q, self.factor(documents, length, q.device))

    def scaled(
        self,
        q: Float[Tensor, "seq batch heads_local head_dim"],
        factor: Float[Tensor, "seq batch_or_1"],
    ) -> Float[Tensor, "seq batch heads_local head_dim"]:
        """q times the factor of each query, and for ssmax times the learned s of each head."""
        factor = factor[..., None, None]
        if self.logit_scale is not None:
            factor = factor * self.logit_scale[:, None]
        return q * factor.to(q.dtype)
