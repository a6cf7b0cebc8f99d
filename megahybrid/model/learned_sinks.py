"""The learned sinks of a layer: one logit for each query head, beside the scores of every query
(gpt-oss, arXiv 2508.10925; GraniteSWA and Flint have them too)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from megahybrid.parallel.linear import sharded_parameter
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.parallel.sharding import Segment


class LearnedSinks(nn.Module):
    """One learned vector [heads], cut by heads as queries are. `name` is the layer's attention, for
    example blocks.3.attention."""

    def __init__(self, num_heads: int, name: str, mesh: ParallelMesh) -> None:
        super().__init__()
        segment = Segment(f"{name}.sinks", (num_heads,), 0)
        self.logits = sharded_parameter((segment,), mesh)

    def forward(self) -> Float[Tensor, " heads_local"]:
        """The logits in fp32 or better, as kernels have their sums: a copy, because ZeRO 3 takes
        the parameter away behind this call."""
        exact = torch.promote_types(self.logits.dtype, torch.float32)
        return self.logits.to(exact, copy=True)
