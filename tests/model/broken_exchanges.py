"""Ways to break what context ranks exchange, one thing at a time and silently."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megahybrid.config.attention import Rope
from megahybrid.model import attention, context, context_attention
from megahybrid.model.context_attention import ShardedCall
from megahybrid.model.kernels.documents import Documents
from megahybrid.model.rotary import RotaryTable
from megahybrid.model.row_shards import RowShards
from megahybrid.parallel import exchange
from megahybrid.parallel.collectives import local_slice
from megahybrid.parallel.mesh import Axis
from tests.model.broken_layers import with_tables

Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], None]


def _on_first_rank(shards: RowShards) -> RowShards:
    """What the axis's first rank holds: positions counted from the start of a shard."""
    return replace(shards, axis=replace(shards.axis, rank=0))


def no_halo(patch: Patch) -> None:
    """Each segment sees its own keys alone."""

    def alone(q: Tensor, k: Tensor, v: Tensor, call: ShardedCall) -> Tensor:
        lengths = [stop - start for start, stop in call.shards.segments]
        parts = zip(*(x.split(lengths) for x in (q, k, v)), call.shards.segments, strict=True)
        return torch.cat([call.run(*heads, *segment) for *heads, segment in parts])

    patch.setattr(context_attention, "_by_halo", alone)


def _running(change: Callable[..., tuple[ShardedCall, Tensor, Tensor, int]]) -> Plant:
    """Calls of a kernel with keys of a halo are changed."""
    right = ShardedCall.run

    def run(self: ShardedCall, q: Tensor, k: Tensor, v: Tensor, first: int, last: int) -> Tensor:
        if first not in [start for start, _ in self.shards.segments]:
            self, k, v, first = change(self, q, k, v, first)
        return right(self, q, k, v, first, last)

    return lambda patch: patch.setattr(ShardedCall, "run", run)


def short_halo(patch: Patch) -> None:
    """A halo of window - 2 keys."""

    def shorter(call: ShardedCall, q: Tensor, k: Tensor, v: Tensor, first: int) -> Any:
        reach = (call.whole.window or 0) - 1
        return (call, k[1:], v[1:], first + 1) if len(k) - len(q) == reach else (call, k, v, first)

    _running(shorter)(patch)


def long_halo(patch: Patch) -> None:
    """A halo of window keys, all of which are seen."""
    right = RowShards.halo

    def longer(call: ShardedCall, q: Tensor, k: Tensor, v: Tensor, first: int) -> Any:
        whole = replace(call.whole, window=(call.whole.window or 0) + 1)
        return replace(call, whole=whole), k, v, max(0, first - 1)

    patch.setattr(RowShards, "halo", lambda self, window: right(self, window + 1))
    _running(longer)(patch)


def upper_left(patch: Patch) -> None:
    """Queries stand at the first keys, as SDPA's causal mask has them."""
    right = ShardedCall.run

    def run(
        self: ShardedCall, q: Tensor, k: Tensor, v: Tensor, first: int, last: int, *heads: slice
    ) -> Tensor:
        own = len(q)
        return right(self, q, k[:own], v[:own], last - own, last, *heads)

    patch.setattr(ShardedCall, "run", run)


def _local_table(batch: Any, rope: Rope, head_dim: int) -> RotaryTable:
    segments = _on_first_rank(batch.shards).segments
    where = (batch.device, batch.dtype)
    return RotaryTable.build(rope, head_dim, batch.length, batch.documents, *where, segments)


def local_keys(patch: Patch) -> None:
    """Keys are rotated at positions counted from their shard."""

    def tables(batch: Any, rope: Rope, head_dim: int) -> Any:
        return batch.rotary_table(rope, head_dim), _local_table(batch, rope, head_dim)

    with_tables(tables)(patch)


def local_positions(patch: Patch) -> None:
    """Queries and keys are."""
    patch.setattr(context.SequenceContext, "rotary_table", _local_table)


def local_temperatures(patch: Patch) -> None:
    """Temperatures are those of the first shard."""
    patch.setattr(
        context.SequenceContext,
        "local",
        lambda self, whole: _on_first_rank(self.shards).cut(whole, dim=0),
    )


def halo_gradients_dropped(patch: Patch) -> None:
    """Keys get no gradient from queries of other ranks."""
    right = exchange._Transfer.start_back
    patch.setattr(exchange._Transfer, "start_back", lambda self, grad: right(self, 0 * grad))


def mixed_layouts(patch: Patch) -> None:
    """Windowed layers take the row for laid in the other way."""
    right = attention.attend_sharded

    def attend(q: Tensor, k: Tensor, v: Tensor, call: ShardedCall) -> Tensor:
        if call.whole.window is not None:
            other = "zigzag" if call.shards.layout == "contiguous" else "contiguous"
            call = replace(call, shards=replace(call.shards, layout=other))
        return right(q, k, v, call)

    patch.setattr(attention, "attend_sharded", attend)


def heads_out_of_order(patch: Patch) -> None:
    """The heads that come back are joined last rank first."""
    right = context_attention._by_heads

    def by_heads(q: Tensor, k: Tensor, v: Tensor, call: ShardedCall) -> Tensor:
        return torch.cat(right(q, k, v, call).chunk(call.shards.axis.size, dim=2)[::-1], dim=2)

    patch.setattr(context_attention, "_by_heads", by_heads)


def joined_as_contiguous(patch: Patch) -> None:
    """Zigzag shards are laid one behind the other."""
    patch.setattr(RowShards, "join", lambda self, of_ranks: of_ranks)


def laid_as_contiguous(patch: Patch) -> None:
    """The same on the way there and back."""
    joined_as_contiguous(patch)
    patch.setattr(RowShards, "part", lambda self, whole: whole)


def gradients_not_summed(patch: Patch) -> None:
    """Each rank keeps what its own queries give its gathered keys."""

    def own(both: Tensor, axis: Axis) -> Any:
        return local_slice(both, axis).chunk(2, dim=2)

    patch.setattr(context_attention, "return_gradients", own)


def first_documents(patch: Patch) -> None:
    """A stretch has the documents of the row's beginning."""
    patch.setattr(
        Documents,
        "stretch",
        lambda self, first, last: Documents(self.starts[:, : last - first].contiguous()),
    )
