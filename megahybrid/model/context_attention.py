"""Attention of a layer whose rows lie on several context ranks.

halo   the keys before each segment come from the ranks that hold them; queries that need none of
       these start before they have come
heads  every rank gets the whole row of some heads, and gives back what they see
keys   the keys of the whole row are gathered, one key head after the other, and gathered again in
       backward, so that a row's keys never stand whole on a rank

Queries and keys are prepared already, by their positions in the whole row. Not so the keys of a
layer with two views of them: they travel once, as no view rotates them, and every rank rotates what
it has received, for each view by itself.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, assert_never

import torch
from jaxtyping import Float
from torch import Tensor

from megahybrid.config.context import Exchange
from megahybrid.config.context_plan import SplitPart
from megahybrid.model.core_attention import (
    CoreAttention,
    attention_backward,
    attention_forward,
    core_attention,
)
from megahybrid.model.kernels import AttentionSpec
from megahybrid.model.rotary import RotaryTable, rotate, rotate_back
from megahybrid.model.row_shards import RowShards
from megahybrid.parallel.exchange import (
    Halo,
    all_to_all,
    return_gradients,
    start_gather_keys,
)

Queries = Float[Tensor, "seq_local batch heads head_dim"]
Keys = Float[Tensor, "seq_local batch kv_heads head_dim"]


@dataclass(frozen=True, eq=False)
class ShardedCall:
    """One layer's attention beside its heads: how the rows lie, what each query sees, and by what
    it is computed. `whole` asks for whole rows; `part` says which heads these are, None where all
    of a layer. `rotation` has the table of positions first … last - 1 for keys that come unrotated,
    None where they are prepared."""

    shards: RowShards
    whole: AttentionSpec
    kernel: str
    attention: CoreAttention = core_attention
    part: SplitPart | None = None
    rotation: Callable[[int, int], RotaryTable] | None = None

    @property
    def exchange(self) -> Exchange:
        """Return how the queries meet their keys."""
        return self.shards.exchange(self.whole.window if self.part is None else self.part)

    def rotated(self, k: Tensor, first: int, last: int) -> Tensor:
        """Return the keys of positions first … last - 1 as queries meet them."""
        return k if self.rotation is None else rotate(k, self.rotation(first, last))

    def rotated_back(self, grad: Tensor, first: int, last: int) -> Tensor:
        """Return the gradient of these keys as they came."""
        return grad if self.rotation is None else rotate_back(grad, self.rotation(first, last))

    def spec(
        self, first: int, last: int, queries: int, heads: slice = slice(None)
    ) -> AttentionSpec:
        """Return what the last `queries` of positions first … last - 1 ask of a kernel, with the
        keys of all of these; `heads` are those of this rank's queries that are computed."""
        documents, sinks = self.whole.documents, self.whole.sinks
        return replace(
            self.whole,
            documents=None if documents is None else documents.stretch(first, last),
            before=(last - first - queries) or None,
            sinks=None if sinks is None else sinks[heads],
        )

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        first: int,
        last: int,
        heads: slice = slice(None),
    ) -> Tensor:
        """Return the attention output of q, the last of positions first … last - 1."""
        return self.attention(q, k, v, self.spec(first, last, len(q), heads), self.kernel)


def attend_sharded(q: Queries, k: Keys, v: Keys, call: ShardedCall) -> Queries:
    """Return the attention output of this rank's queries over the whole rows; collective."""
    match call.exchange:
        case "halo":
            return _by_halo(q, k, v, call)
        case "heads":
            return _by_heads(q, k, v, call)
        case "keys":
            return _by_keys(q, k, v, call)
        case other:
            assert_never(other)


def attend_sharded_views(
    queries: Sequence[Queries], k: Keys, v: Keys, calls: Sequence[ShardedCall]
) -> Sequence[Queries]:
    """Return the attention output of each view of the same keys, whose queries are prepared and
    whose keys are not; the last view sees the farthest. Collective: what it needs comes once, by
    halo or keys. Where heads are exchanged, `whole_rows` brings them and views are none of it.
    """
    match calls[-1].exchange:
        case "halo":
            return _views_by_halo(queries, k, v, calls)
        case "keys":
            return _views_by_keys(queries, k, v, calls)
        case "heads":
            raise ValueError("heads of whole rows need no exchange for each view")
        case other:
            assert_never(other)


def _by_halo(q: Tensor, k: Tensor, v: Tensor, call: ShardedCall) -> Tensor:
    return _views_by_halo((q,), k, v, (call,))[0]


def _views_by_halo(
    queries: Sequence[Tensor], k: Tensor, v: Tensor, calls: Sequence[ShardedCall]
) -> list[Tensor]:
    shards, came = calls[-1].shards, (calls[-1].whole.window or 0) - 1
    halo = Halo(k, v, shards.halo(came + 1), shards.axis)
    lengths = [stop - start for start, stop in shards.segments]
    own = list(zip(halo.key.split(lengths), halo.value.split(lengths), strict=True))
    views = [_Edges.of(q, call, came) for q, call in zip(queries, calls, strict=True)]
    inner = [view.inner(own) for view in views]
    outer = [view.outer(own, halo) for view in views]
    halo.finish()
    return [
        torch.cat([part for pair in zip(*parts, strict=True) for part in pair])
        for parts in zip(outer, inner, strict=True)
    ]


class _Edges(NamedTuple):
    """The queries of a view by segment: those that see keys before it, and the others."""

    call: ShardedCall
    reach: int
    came: int  # keys before a segment, at most
    queries: Sequence[Tensor]  # of each segment both

    @classmethod
    def of(cls, q: Tensor, call: ShardedCall, came: int) -> "_Edges":
        reach, sizes = (call.whole.window or 0) - 1, []
        for start, stop in call.shards.segments:
            edge = min(reach, stop - start) if start else 0
            sizes += [edge, stop - start - edge]
        return cls(call, reach, came, q.split(sizes))

    def inner(self, own: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """The output of queries that see keys of their own segment alone."""
        call, found = self.call, []
        for segment, (k, v), q in zip(call.shards.segments, own, self.queries[1::2], strict=True):
            found.append(call.run(q, call.rotated(k, *segment), v, *segment) if len(q) else q)
        return found

    def outer(self, own: Sequence[tuple[Tensor, Tensor]], halo: Halo) -> list[Tensor]:
        """The output of the others, once the keys before them have come."""
        call, found = self.call, []
        for index, q in enumerate(self.queries[::2]):
            edge = len(q)
            if not edge:
                found.append(q)
                continue
            start, (k, v) = call.shards.segments[index][0], own[index]
            before_k, before_v = halo.before(index)
            first, last = max(0, start - self.reach), start + edge
            more = min(start, self.came) - min(start, self.reach)  # for a view that sees farther
            keys = torch.cat((*before_k, k[:edge]))[more:]
            values = torch.cat((*before_v, v[:edge]))[more:]
            found.append(call.run(q, call.rotated(keys, first, last), values, first, last))
        return found


class WholeRows(NamedTuple):
    """Some heads of whole rows: what `heads` brings to a rank."""

    q: Tensor  # [seq, batch, heads / ranks, head_dim]
    k: Tensor
    v: Tensor
    gates: Tensor | None  # [seq, batch, heads / ranks]: what goes where queries go
    heads: slice  # these, of the rank's


def whole_rows(
    q: Queries, k: Keys, v: Keys, shards: RowShards, gates: Tensor | None = None
) -> WholeRows:
    """Return this rank's part of the heads for the whole rows; collective. `own_tokens` takes what
    comes of them back."""
    axis = shards.axis
    ranks, even = axis.size, (len(q),) * axis.size
    # [ranks, seq_local, batch, heads / ranks and two times the key heads of these, head_dim]
    by_rank = torch.cat([_for_ranks(x, ranks) for x in (q, k, v)], dim=3)
    whole = shards.join(all_to_all(by_rank.flatten(0, 1), even, even, axis))
    heads = q.shape[2] // ranks
    kv_heads = (whole.shape[2] - heads) // 2
    if gates is not None:
        of_ranks = gates.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3)
        gates = shards.join(all_to_all(of_ranks.flatten(0, 1), even, even, axis))
    these = slice(axis.rank * heads, (axis.rank + 1) * heads)
    whole_q, whole_k, whole_v = whole.split((heads, kv_heads, kv_heads), dim=2)
    return WholeRows(whole_q, whole_k, whole_v, gates, these)


def own_tokens(out: Float[Tensor, "seq batch some_heads head_dim"], shards: RowShards) -> Queries:
    """Return all heads of this rank's tokens from what each rank has of some; collective."""
    ranks = shards.axis.size
    here = len(out) // ranks
    even = (here,) * ranks
    back = all_to_all(shards.part(out), even, even, shards.axis).unflatten(0, (ranks, here))
    return back.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _by_heads(q: Tensor, k: Tensor, v: Tensor, call: ShardedCall) -> Tensor:
    whole = whole_rows(q, k, v, call.shards)
    out = call.run(whole.q, whole.k, whole.v, 0, call.shards.length, whole.heads)
    return own_tokens(out, call.shards)


def _for_ranks(x: Tensor, ranks: int) -> Tensor:
    """[seq, batch, heads, head_dim] -> [ranks, seq, batch, heads of a rank, head_dim]: an equal
    share of the heads for each rank, or the one head that its queries share where there are more
    ranks than heads."""
    heads = x.shape[2]
    if heads % ranks:
        mine = torch.arange(ranks, device=x.device) * heads // ranks
        x = x.index_select(2, mine)
    return x.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4)


def _by_keys(q: Tensor, k: Tensor, v: Tensor, call: ShardedCall) -> Tensor:
    return _views_by_keys((q,), k, v, (call,))[0]


def _views_by_keys(
    queries: Sequence[Tensor], k: Tensor, v: Tensor, calls: Sequence[ShardedCall]
) -> Sequence[Tensor]:
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*queries, k, v)):
        # Sinks go with one view: a layer with two has none.
        gathered: tuple[Tensor, ...] = _AttendGathered.apply(
            k, v, calls[0].whole.sinks, calls, *queries
        )
        return gathered
    group = queries[0].shape[2] // k.shape[2]
    outs_of: list[list[Tensor]] = [[] for _ in calls]
    for head, keys, values in _gathered(k, v, calls[0]):
        of_head = slice(head * group, (head + 1) * group)
        for q, call, outs in zip(queries, calls, outs_of, strict=True):
            parts = [
                call.run(
                    q[some, :, of_head],
                    call.rotated(keys[first:last], first, last),
                    values[first:last],
                    *(first, last, of_head),
                )
                for some, first, last in _segments(call)
            ]
            outs.append(torch.cat(parts))
    return [torch.cat(outs, dim=2) for outs in outs_of]


def _segments(call: ShardedCall) -> Iterator[tuple[slice, int, int]]:
    """(where they lie on this rank, first and last position of the keys that they see) of this
    rank's segments."""
    offset, window = 0, call.whole.window
    for start, stop in call.shards.segments:
        first = 0 if window is None else max(0, start - window + 1)
        yield slice(offset, offset + stop - start), first, stop
        offset += stop - start


def _gathered(k: Tensor, v: Tensor, call: ShardedCall) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(key head, its keys and values of the whole rows), one after the other; the next are under
    way meanwhile."""
    heads = k.shape[2]
    coming = start_gather_keys(k[:, :, :1], v[:, :, :1], call.shards.axis)
    for head in range(heads):
        both = call.shards.join(coming.wait())
        if head + 1 < heads:
            some = slice(head + 1, head + 2)
            coming = start_gather_keys(k[:, :, some], v[:, :, some], call.shards.axis)
        yield head, both[:, :, :1], both[:, :, 1:]


class _AttendGathered(torch.autograd.Function):
    """(k, v, sinks, calls, queries of each call) -> the output of each."""

    @staticmethod
    def forward(
        ctx: Any,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        calls: Sequence[ShardedCall],
        *queries: Tensor,
    ) -> tuple[Tensor, ...]:
        group = queries[0].shape[2] // k.shape[2]
        outs = [torch.empty_like(q, memory_format=torch.contiguous_format) for q in queries]
        kept: list[Tensor] = []
        counts: list[int] = []
        for head, keys, values in _gathered(k, v, calls[0]):
            of_head = slice(head * group, (head + 1) * group)
            for q, out, call in zip(queries, outs, calls, strict=True):
                for some, first, last in _segments(call):
                    seen = slice(first, last)
                    spec = call.spec(first, last, some.stop - some.start, of_head)
                    part, needed = attention_forward(
                        q[some, :, of_head],
                        call.rotated(keys[seen], first, last),
                        values[seen],
                        spec,
                        call.kernel,
                    )
                    out[some, :, of_head] = part
                    kept += needed
                    counts.append(len(needed))
        ctx.calls, ctx.counts = calls, counts
        ctx.save_for_backward(k, v, *queries, *outs, *kept)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        calls, counts, (k, v, *saved) = ctx.calls, iter(ctx.counts), ctx.saved_tensors
        views = len(calls)
        queries, outs, kept = saved[:views], saved[views : 2 * views], saved[2 * views :]
        group, shards = queries[0].shape[2] // k.shape[2], calls[0].shards
        by_k, by_v, *by_queries = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v, *queries)
        )
        sinks = calls[0].whole.sinks
        by_sinks = None if sinks is None else torch.zeros_like(sinks)
        for head, keys, values in _gathered(k, v, calls[0]):
            of_head = slice(head * group, (head + 1) * group)
            both = keys.new_zeros(len(keys), keys.shape[1], 2, keys.shape[3])
            for q, out, grad, by_q, call in zip(
                queries, outs, grads, by_queries, calls, strict=True
            ):
                for some, first, last in _segments(call):
                    count, seen = next(counts), slice(first, last)
                    needed, kept = tuple(kept[:count]), kept[count:]
                    spec = call.spec(first, last, some.stop - some.start, of_head)
                    of_query, of_keys, of_values, of_sinks = attention_backward(
                        grad[some, :, of_head],
                        q[some, :, of_head],
                        call.rotated(keys[seen], first, last),
                        values[seen],
                        out[some, :, of_head],
                        needed,
                        spec,
                        call.kernel,
                    )
                    by_q[some, :, of_head] = of_query
                    both[seen, :, :1] += call.rotated_back(of_keys, first, last)
                    both[seen, :, 1:] += of_values
                    if by_sinks is not None and of_sinks is not None:
                        by_sinks[of_head] += of_sinks
            by_k[:, :, head : head + 1], by_v[:, :, head : head + 1] = return_gradients(
                shards.part(both), shards.axis
            )
        return by_k, by_v, by_sinks, None, *by_queries
