"""Sums of tokens' figures kept apart by document and by position, and what they are a sample of.

Tokens of one document are no independent draws, so intervals resample whole documents.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from megahybrid.parallel.collectives import all_reduce
from megahybrid.parallel.mesh import Axis

DRAWS = 2000
SEED = 0  # of every interval: the same scores have the same interval
DRAWN_AT_ONCE = 2**22  # documents in a piece of the draws: 32 MB


class DocumentSums:
    """Sums of several figures over the tokens of each document, in buckets of positions.

    Position n has n tokens of its document before it; bucket b holds edges[b] … edges[b + 1] - 1.
    The last row of `total` is how many tokens were added.
    """

    def __init__(
        self, figures: int, documents: int, edges: Sequence[int], device: torch.device
    ) -> None:
        self.edges = list(edges)
        self._edges = torch.tensor(self.edges, device=device)
        shape = (figures + 1, documents, len(self.edges) - 1)
        self._sums = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(
        self,
        document: Int[Tensor, "batch"],
        position: Int[Tensor, "batch seq"],
        counted: Bool[Tensor, "batch seq"],
        *figures: Float[Tensor, "batch seq"],
    ) -> None:
        """Add the counted tokens of rows, each of one document."""
        bucket = torch.bucketize(position[counted], self._edges, right=True) - 1
        row = document[:, None].expand_as(position)[counted]
        place = row * (len(self.edges) - 1) + bucket
        for sums, figure in zip(self._sums, figures, strict=False):
            sums.view(-1).index_add_(0, place, figure[counted].double())
        self._sums[-1].view(-1).index_add_(0, place, torch.ones_like(place, dtype=torch.float64))

    def total(self, replicas: Axis) -> np.ndarray:
        """The sums [figures + 1, documents, buckets] over all ranks; collective."""
        return all_reduce(self._sums, replicas).cpu().numpy()


def ratio_interval(
    sums: np.ndarray, counts: np.ndarray, draws: int = DRAWS, seed: int = SEED
) -> tuple[float, float] | tuple[None, None]:
    """95 % interval of sum(sums) / sum(counts) over documents that are drawn anew, with
    replacement: the percentile bootstrap over clusters. None for fewer than two documents.

    Documents without a count are left out first: the draws are of those that have some.
    """
    known = counts > 0
    sums, counts = sums[known], counts[known]
    documents = len(sums)
    if documents < 2:
        return None, None
    generator, found = np.random.default_rng(seed), []
    at_once = max(1, DRAWN_AT_ONCE // documents)
    for first in range(0, draws, at_once):
        chosen = generator.integers(documents, size=(min(at_once, draws - first), documents))
        found.append(sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1))
    low, high = np.quantile(np.concatenate(found), (0.025, 0.975))
    return float(low), float(high)
