"""Whole rows in and out of layers whose rows lie on context ranks: so one test asks both.

Nothing of `RowShards` is used but its segments: what cuts and joins rows in training is under test.
"""

from typing import Any

import torch
from torch import Tensor

from megahybrid.model.row_shards import RowShards
from megahybrid.parallel.collectives import all_gather, all_reduce


def places(shards: RowShards, rank: int) -> Tensor:
    """Return the positions in the row of the tokens that a rank holds, in its order."""
    ranges = [torch.arange(start, stop) for start, stop in shards.of_ranks[rank]]
    return torch.cat(ranges)


def own_places(shards: RowShards | None) -> Tensor | slice:
    """Return the index of this rank's tokens in a row: of all where rows are not cut."""
    return slice(None) if shards is None else places(shards, shards.axis.rank)


def holder(shards: RowShards, token: int) -> int:
    """Return the world rank that holds a token of the row."""
    axis = shards.axis
    held = [any(start <= token < stop for start, stop in each) for each in shards.of_ranks]
    return axis.ranks[held.index(True)]


def own_tokens(whole: Tensor, shards: RowShards) -> Tensor:
    """Whole rows [seq, ...], alike on every rank -> this rank's tokens. Backward gives every rank
    the gradient of all tokens."""
    result: Tensor = _OwnTokens.apply(whole, shards)
    return result


def whole_rows(mine: Tensor, shards: RowShards) -> Tensor:
    """This rank's tokens [seq_local, ...] -> whole rows, used alike on every rank. Backward takes
    this rank's part."""
    result: Tensor = _WholeRows.apply(mine, shards)
    return result


def sum_over_ranks(mine: Tensor, shards: RowShards | None) -> Tensor:
    """Return the sum over ranks of what each one's tokens give."""
    return mine if shards is None else all_reduce(mine.clone(), shards.axis)


def _joined(mine: Tensor, shards: RowShards) -> Tensor:
    of_ranks = all_gather(mine, shards.axis)
    every = torch.cat([places(shards, rank) for rank in range(shards.axis.size)])
    return torch.empty_like(of_ranks).index_copy_(0, every.to(mine.device), of_ranks)


def _own(whole: Tensor, shards: RowShards) -> Tensor:
    return whole[places(shards, shards.axis.rank).to(whole.device)]


class _OwnTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, shards: RowShards) -> Tensor:
        ctx.shards = shards
        return _own(whole, shards)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _joined(grads[0], ctx.shards), None


class _WholeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, shards: RowShards) -> Tensor:
        ctx.shards = shards
        return _joined(mine, shards)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _own(grads[0], ctx.shards), None
