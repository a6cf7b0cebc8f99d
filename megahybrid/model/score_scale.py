"""The scale of the scores: a number for all, and factors that depend on the query, by which q is
multiplied before attention."""

from functools import lru_cache
from typing import assert_never

import torch
from jaxtyping import Float
from torch import Tensor, nn

from megahybrid.config.attention import AttentionScheme
from megahybrid.config.score_scale import (
    FixedScale,
    Llama4Scale,
    LogFromScale,
    LogScale,
    PowerScale,
    SqrtDimScale,
    SsmaxScale,
)
from megahybrid.config.ssmax_start import start_of
from megahybrid.model.kernels.documents import Documents
from megahybrid.parallel.linear import sharded_parameter
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.parallel.sharding import Segment

PositionScale = Llama4Scale | PowerScale | LogScale | LogFromScale | SsmaxScale


def score_scale(scheme: AttentionScheme, head_dim: int) -> float:
    """Return what q·k is multiplied by for every query alike."""
    match scheme.score_scale:
        case FixedScale(scale=scale):
            return scale
        case SqrtDimScale() | Llama4Scale() | PowerScale() | LogScale() | LogFromScale():
            return head_dim**-0.5
        case SsmaxScale():
            return head_dim**-0.5
        case other:
            assert_never(other)


def query_factor(
    scale: PositionScale,
    window: int | None,
    chunk: int | None,
    documents: Documents | None,
    length: int,
    device: torch.device,
) -> Float[Tensor, "seq batch"]:
    """The factor of each query, fp32; ssmax's learned s is not in it. batch 1: alike in all rows.

    llama4 and power count the position p within the document, 1 + c ln(1 + floor((p + offset) /
    floor)) and (1 + (p + 1) / length)^c; log, log_from and ssmax count the n keys the query sees,
    at most `window` or those of its `chunk`: log_a(a + n), 1 + c ln max(n / length, 1) and ln n.
    """
    if documents is None:
        position = torch.arange(length, device=device)[:, None]
    else:
        position = documents.positions().T
    keys = position + 1 if chunk is None else position % chunk + 1
    keys = keys if window is None else keys.clamp(max=window)
    match scale:
        case Llama4Scale():
            steps = (position + scale.offset) // scale.floor
            return 1 + scale.coefficient * torch.log1p(steps.float())
        case PowerScale():
            # In fp64: a power in fp32 is rounded otherwise for one query than for many.
            return ((1 + (position + 1).double() / scale.length) ** scale.exponent).float()
        case LogScale():
            # The quotient of two fp32 logarithms: a base given as a number has no rounding of its
            # own.
            return torch.log(scale.base + keys.float()) / torch.log(torch.tensor(float(scale.base)))
        case LogFromScale():
            return 1 + scale.coefficient * torch.log((keys.float() / scale.length).clamp(min=1))
        case SsmaxScale():
            return torch.log(keys.float())
        case other:
            assert_never(other)


@lru_cache(maxsize=8)
def _plain_factor(
    scale: PositionScale,
    window: int | None,
    chunk: int | None,
    length: int,
    device: torch.device,
) -> Tensor:
    """Return the factor of rows of one document: the same for every batch."""
    return query_factor(scale, window, chunk, None, length, device)


class QueryScale(nn.Module):
    """`query_factor` of a scheme, and for ssmax a learned s per head."""

    def __init__(
        self,
        scale: PositionScale,
        window: int | None,
        chunk: int | None,
        num_heads: int,
        name: str,
        mesh: ParallelMesh,
    ) -> None:
        super().__init__()
        self.scale, self.window, self.chunk = scale, window, chunk
        self.logit_scale: nn.Parameter | None = None
        if isinstance(scale, SsmaxScale):
            segment = Segment(f"{name}.logit_scale", (num_heads,), 0)
            self.logit_scale = sharded_parameter((segment,), mesh, value=start_of(scale))

    @classmethod
    def of(
        cls, scheme: AttentionScheme, num_heads: int, name: str, mesh: ParallelMesh
    ) -> "QueryScale | None":
        """The module of a scheme; None where the scale is the same for every query.

        `name` is the layer's attention, for example blocks.3.attention.
        """
        match scheme.score_scale:
            case (
                Llama4Scale() | PowerScale() | LogScale() | LogFromScale() | SsmaxScale()
            ) as scale:
                return cls(scale, scheme.window, scheme.chunk, num_heads, name, mesh)
            case SqrtDimScale() | FixedScale():
                return None
            case other:
                assert_never(other)

    def factor(
        self, documents: Documents | None, length: int, device: torch.device
    ) -> Float[Tensor, "seq batch"]:
        """`query_factor` of a batch, made once for all layers of the same scale, window and
        chunk."""
        if documents is None:
            return _plain_factor(self.scale, self.window, self.chunk, length, device)
        return documents.keep(
            ("query_factor", self.scale, self.window, self.chunk),
            lambda: query_factor(self.scale, self.window, self.chunk, documents, length, device),
        )

    def forward(
        self, factor: Float[Tensor, "seq batch_or_1"], heads: slice = slice(None)
    ) -> Float[Tensor, "seq batch_or_1 heads_or_1 1"]:
        """The factor of each query and head: for ssmax times the learned s of the head; `heads` of
        this rank's are asked for."""
        factor = factor[..., None, None]
        return factor if self.logit_scale is None else factor * self.logit_scale[heads, None]
