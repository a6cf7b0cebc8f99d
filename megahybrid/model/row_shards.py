"""How a row lies on context ranks: cutting what belongs to its tokens, and joining it again."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import assert_never

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from megahybrid.config.context import Exchange, Layout, segments
from megahybrid.config.context_plan import Part, plan_context
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig
from megahybrid.config.parallel import ParallelConfig
from megahybrid.parallel.collectives import all_gather, all_reduce
from megahybrid.parallel.exchange import HaloPlan, Range
from megahybrid.parallel.mesh import Axis, ParallelMesh


@dataclass(frozen=True)
class RowShards:
    """Rows of `length` tokens on the ranks of a context axis: rank r holds its segments of each
    row, one behind the other. `exchanges` has (window, exchange) of every window of the plan, and
    of each part of heads that are split over two views."""

    axis: Axis
    layout: Layout
    length: int
    exchanges: tuple[tuple[Part, Exchange], ...]

    def exchange(self, part: Part) -> Exchange:
        """Return how queries of layers with this window, or of a part of their heads, meet their
        keys."""
        return dict(self.exchanges)[part]

    @cached_property
    def of_ranks(self) -> tuple[tuple[Range, ...], ...]:
        """The segments of every rank, in rank order: positions of the row."""
        degree = self.axis.size
        return tuple(segments(self.layout, self.length, degree, rank) for rank in range(degree))

    @property
    def segments(self) -> tuple[Range, ...]:
        """The segments of this rank."""
        return self.of_ranks[self.axis.rank]

    def cut(self, whole: Tensor, dim: int) -> Tensor:
        """Return what belongs to this rank's tokens of something that has an entry for each token
        of a row along `dim`; all of it where it has one entry for all."""
        if whole.shape[dim] == 1:
            return whole
        parts = [whole.narrow(dim, start, stop - start) for start, stop in self.segments]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def join(self, of_ranks: Tensor) -> Tensor:
        """Return [tokens of rank 0, tokens of rank 1, …] along dimension 0 in the row's order."""
        match self.layout:
            case "contiguous":
                return of_ranks
            case "zigzag":
                halves = of_ranks.unflatten(0, (self.axis.size, 2, -1))
                return torch.cat((halves[:, 0].flatten(0, 1), halves[:, 1].flip(0).flatten(0, 1)))
            case other:
                assert_never(other)

    def part(self, whole: Tensor) -> Tensor:
        """Return a row's tokens along dimension 0 in the order of the ranks: what `join` undoes."""
        match self.layout:
            case "contiguous":
                return whole
            case "zigzag":
                first, second = whole.unflatten(0, (2, self.axis.size, -1)).unbind()
                return torch.stack((first, second.flip(0)), dim=1).flatten(0, 2)
            case other:
                assert_never(other)

    @torch.no_grad()
    def gather(self, local: Tensor, dim: int) -> Tensor:
        """Return the whole of what `cut` takes apart, without gradients; collective."""
        of_ranks = all_gather(local.movedim(dim, 0).contiguous(), self.axis)
        return self.join(of_ranks).movedim(0, dim)

    @torch.no_grad()
    def pick(
        self, local: Shaped[Tensor, "seq_local *rest"], positions: Int[Tensor, "rows"]
    ) -> Shaped[Tensor, "rows *rest"]:
        """Return what belongs to these positions of the row, on every rank; collective."""
        found, offset = local.new_zeros((len(positions), *local.shape[1:])), 0
        for start, stop in self.segments:
            here = (positions >= start) & (positions < stop)
            found[here] = local[positions[here] - start + offset]
            offset += stop - start
        return all_reduce(found, self.axis)  # one rank has each, the others zeros

    def halo(self, window: int) -> HaloPlan:
        """Return what this rank sends and receives for a window."""
        return _halo_plan(self.of_ranks, self.axis.rank, window - 1)


@lru_cache(maxsize=64)
def _halo_plan(of_ranks: tuple[tuple[Range, ...], ...], rank: int, reach: int) -> HaloPlan:
    return HaloPlan.of(of_ranks, rank, reach)


@dataclass(frozen=True)
class ContextRanks:
    """The context ranks of a mesh, and what a run file says about them: how many share a row of
    which length, and what they exchange."""

    mesh: ParallelMesh
    model: ModelConfig
    parallel: ParallelConfig

    def multiple(self, length: int) -> int:
        """Return what a row of about `length` tokens must be a multiple of."""
        degree = self.parallel.context_degree(length)
        return degree * self.mesh.tensor.size * (2 if degree > 1 else 1)

    def filled(self, length: int) -> int:
        """Return the smallest number of tokens, `length` or more, that the ranks of a row share
        evenly."""
        while over := length % self.multiple(length):
            length += self.multiple(length) - over
        return length

    def shards(self, plan: LayerPlan, length: int) -> RowShards | None:
        """Return how rows of `length` tokens lie; None where each rank has its own."""
        crossing = plan_context(self.model, self.parallel, plan, length)
        if crossing.degree == 1:
            return None
        by_part = {each.part: found for each, found in crossing.crossings if found is not None}
        axis = self.mesh.context_of(crossing.degree)
        return RowShards(axis, crossing.layout, length, tuple(by_part.items()))
