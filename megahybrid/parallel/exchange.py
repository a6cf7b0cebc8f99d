"""What context ranks send one another so that each query meets its keys.

Tensors have the sequence as dimension 0. Each autograd function's backward is the adjoint of its
forward: what came from a rank goes back to it, and is added there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

from megahybrid.parallel.collectives import Pending, reduce_scatter, start_all_gather
from megahybrid.parallel.mesh import Axis

Range = tuple[int, int]  # first, and one behind the last


def start_all_to_all(
    x: Shaped[Tensor, "seq *rest"], send: Sequence[int], receive: Sequence[int], axis: Axis
) -> Pending:
    """Send `send[r]` entries of dimension 0 to each rank r of the axis, in rank order, and receive
    `receive[r]` from it: [sum(receive), *rest] once it is waited for."""
    x = x.contiguous()
    if axis.size == 1:
        return Pending(x, None, x)
    result = x.new_empty((sum(receive), *x.shape[1:]))
    work = dist.all_to_all_single(
        result, x, list(receive), list(send), group=axis.group, async_op=True
    )
    return Pending(result, work, x)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: Sequence[int], receive: Sequence[int], axis: Axis
    ) -> Tensor:
        ctx.splits, ctx.axis = (send, receive), axis
        return start_all_to_all(x, send, receive, axis).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive = ctx.splits
        return start_all_to_all(grads[0], receive, send, ctx.axis).wait(), None, None, None


def all_to_all(
    x: Float[Tensor, "seq *rest"], send: Sequence[int], receive: Sequence[int], axis: Axis
) -> Float[Tensor, "seq_out *rest"]:
    """`start_all_to_all`, waited for. Backward sends every gradient back where it came from."""
    return x if axis.size == 1 else _AllToAll.apply(x, tuple(send), tuple(receive), axis)


@dataclass(frozen=True)
class Source:
    """A range of a stretch of keys: where it lies on this rank. `received`: in what came, else
    among this rank's own."""

    received: bool
    start: int
    stop: int


@dataclass(frozen=True)
class HaloPlan:
    """The keys that one rank sends and receives so that each of its segments has those before it.

    `sends[r]`: ranges of its own keys that rank r wants, in the order in which that reads them.
    `receives[r]`: how many come from rank r. `before[s]`: where the keys before segment s lie, the
    first one first.
    """

    sends: tuple[tuple[Range, ...], ...]
    receives: tuple[int, ...]
    before: tuple[tuple[Source, ...], ...]

    @property
    def send_counts(self) -> tuple[int, ...]:
        """Return how many keys go to each rank."""
        return tuple(sum(stop - start for start, stop in ranges) for ranges in self.sends)

    @classmethod
    def of(cls, segments: Sequence[Sequence[Range]], rank: int, reach: int) -> "HaloPlan":
        """Return the plan of `rank`, where rank r holds the positions of `segments[r]`, one range
        behind the other, and each segment wants the `reach` keys before it."""
        owned = [_offsets(of_rank) for of_rank in segments]
        sends: list[tuple[Range, ...]] = []
        for other, of_other in enumerate(segments):
            wanted = _wanted(of_other, reach, owned)
            mine = [(at, stop - start + at) for _, r, start, stop, at in wanted if r == rank]
            sends.append(tuple(mine) if other != rank else ())
        wanted = _wanted(segments[rank], reach, owned)
        counts = [0] * len(segments)
        for _, r, start, stop, _ in wanted:
            counts[r] += (stop - start) if r != rank else 0
        next_of = [sum(counts[:r]) for r in range(len(segments))]
        before: list[list[Source]] = [[] for _ in segments[rank]]
        for segment, r, start, stop, at in wanted:
            if r == rank:
                before[segment].append(Source(False, at, at + stop - start))
                continue
            before[segment].append(Source(True, next_of[r], next_of[r] + stop - start))
            next_of[r] += stop - start
        return cls(tuple(sends), tuple(counts), tuple(tuple(each) for each in before))


def _offsets(segments: Sequence[Range]) -> list[tuple[Range, int]]:
    """Return each segment with the place at which its rank holds its first position."""
    found, offset = [], 0
    for start, stop in segments:
        found.append(((start, stop), offset))
        offset += stop - start
    return found


def _wanted(
    segments: Sequence[Range], reach: int, owned: Sequence[Sequence[tuple[Range, int]]]
) -> list[tuple[int, int, int, int, int]]:
    """Return (segment, rank that has it, first and last position, place on that rank) of all keys
    before the segments, in the order of segments and positions."""
    found = []
    for index, (start, _) in enumerate(segments):
        first = max(0, start - reach)
        for rank, ranges in enumerate(owned):
            for (begin, end), offset in ranges:
                low, high = max(first, begin), min(start, end)
                if low < high:
                    found.append((index, rank, low, high, offset + low - begin))
    return sorted(found, key=lambda each: (each[0], each[2]))


class _Transfer:
    """A halo under way: the forward's keys, then the backward's gradients."""

    def __init__(self, plan: HaloPlan, axis: Axis) -> None:
        self.plan, self.axis = plan, axis
        self.keys: Pending | None = None
        self.gradients: Pending | None = None

    def start_back(self, grad: Tensor) -> None:
        """Send the gradients of received keys to the ranks that hold these."""
        plan = self.plan
        self.gradients = start_all_to_all(grad, plan.receives, plan.send_counts, self.axis)


class _StartHalo(torch.autograd.Function):
    """k, v -> what comes (a buffer that is being filled), and k and v again: their gradients pass
    through here on every rank, so that every rank takes part in the way back."""

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, transfer: _Transfer
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.transfer = transfer
        plan = transfer.plan
        both = [
            torch.cat((k[start:stop], v[start:stop]), dim=2)
            for ranges in plan.sends
            for start, stop in ranges
        ]
        empty = k.new_empty((0, k.shape[1], 2 * k.shape[2], k.shape[3]))
        sent = torch.cat(both) if both else empty
        transfer.keys = start_all_to_all(sent, plan.send_counts, plan.receives, transfer.axis)
        ctx.received_shape = (sum(plan.receives), *empty.shape[1:])
        # Its result is filled later; _FinishHalo waits for it.
        return transfer.keys.result, k.view_as(k), v.view_as(v)

    @staticmethod
    def backward(
        ctx: Any, by_received: Tensor | None, *grads: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        transfer, (by_k, by_v) = ctx.transfer, grads
        assert by_k is not None and by_v is not None
        if transfer.gradients is None:  # no query of this rank used what came
            if by_received is None:
                by_received = by_k.new_zeros(ctx.received_shape)
            transfer.start_back(by_received)
        came = transfer.gradients.wait()
        transfer.gradients = None
        if len(came):
            by_k, by_v = by_k.clone(), by_v.clone()
            offset = 0
            for ranges in transfer.plan.sends:
                for start, stop in ranges:
                    part = came[offset : offset + stop - start]
                    of_keys, of_values = part.chunk(2, dim=2)
                    by_k[start:stop] += of_keys
                    by_v[start:stop] += of_values
                    offset += stop - start
        return by_k, by_v, None


class _FinishHalo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, received: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        assert transfer.keys is not None
        transfer.keys.wait()
        transfer.keys = None
        return received.view_as(received)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.start_back(grads[0])
        return grads[0], None


class Halo:
    """The keys and values before each of this rank's segments, under way from the ranks that hold
    them. `key` and `value` are this rank's own; use these in place of what was given.

    Every rank of the axis makes one alike, and runs backward through `key` and `value`.
    """

    def __init__(
        self,
        k: Float[Tensor, "seq batch kv_heads head_dim"],
        v: Float[Tensor, "seq batch kv_heads head_dim"],
        plan: HaloPlan,
        axis: Axis,
    ) -> None:
        self._transfer, self._plan = _Transfer(plan, axis), plan
        self._received, self.key, self.value = _StartHalo.apply(k, v, self._transfer)
        self._there = False

    def finish(self) -> None:
        """Wait for what came, so that none of it is under way when its memory goes."""
        if not self._there:
            self._received = _FinishHalo.apply(self._received, self._transfer)
            self._there = True

    def before(self, segment: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return the keys and values before a segment, in pieces to be joined, the first one first;
        waits for them. Empty lists where none comes before."""
        sources = self._plan.before[segment]
        self.finish()
        keys, values = [], []
        for source in sources:
            some = slice(source.start, source.stop)
            if source.received:
                of_keys, of_values = self._received[some].chunk(2, dim=2)
            else:
                of_keys, of_values = self.key[some], self.value[some]
            keys.append(of_keys)
            values.append(of_values)
        return keys, values


def start_gather_keys(
    k: Float[Tensor, "seq_local batch heads head_dim"],
    v: Float[Tensor, "seq_local batch heads head_dim"],
    axis: Axis,
) -> Pending:
    """Return the keys and values of all ranks [seq, batch, 2 heads, head_dim], beside each other,
    in rank order, once waited for. Without gradients: `return_gradients` is its adjoint."""
    return start_all_gather(torch.cat((k, v), dim=2), axis)


def return_gradients(
    both: Float[Tensor, "seq batch heads_twice head_dim"], axis: Axis
) -> tuple[Tensor, Tensor]:
    """Return this rank's part of the sum of what every rank has for the result of
    `start_gather_keys`, keys and values apart."""
    by_k, by_v = reduce_scatter(both, axis).chunk(2, dim=2)
    return by_k, by_v
