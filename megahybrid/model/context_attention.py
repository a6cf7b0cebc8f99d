"""Attention of a layer whose rows lie on several context ranks.

halo   the keys before each segment come from the ranks that hold them; queries that need none of
       these start before they have come
heads  every rank gets the whole row of some heads, and gives back what they see
keys   the keys of the whole row are gathered, one key head after the other, and gathered again in
       backward, so that a row's keys never stand whole on a rank

Queries and keys are prepared already, by their positions in the whole row.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, assert_never

import torch
from jaxtyping import Float
from torch import Tensor

from megahybrid.model.core_attention import (
    CoreAttention,
    attention_backward,
    attention_forward,
    core_attention,
)
from megahybrid.model.kernels import AttentionSpec
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
    it is computed. `whole` asks for whole rows."""

    shards: RowShards
    whole: AttentionSpec
    kernel: str
    attention: CoreAttention = core_attention

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
    match call.shards.exchange(call.whole.window):
        case "halo":
            return _by_halo(q, k, v, call)
        case "heads":
            return _by_heads(q, k, v, call)
        case "keys":
            return _by_keys(q, k, v, call)
        case other:
            assert_never(other)


def _by_halo(q: Tensor, k: Tensor, v: Tensor, call: ShardedCall) -> Tensor:
    shards, reach = call.shards, (call.whole.window or 0) - 1
    halo = Halo(k, v, shards.halo(reach + 1), shards.axis)
    # Of each segment: queries that see keys before it, and the others.
    lengths = [stop - start for start, stop in shards.segments]
    edges = [min(reach, stop - start) if start else 0 for start, stop in shards.segments]
    sizes = [size for e, n in zip(edges, lengths, strict=True) for size in (e, n - e)]
    queries = q.split(sizes)
    keys, values = halo.key.split(lengths), halo.value.split(lengths)
    inner = [
        call.run(rest, keys[index], values[index], *shards.segments[index]) if len(rest) else rest
        for index, rest in enumerate(queries[1::2])
    ]
    outer = []
    for index, edge in enumerate(queries[::2]):
        if not len(edge):
            outer.append(edge)
            continue
        start = shards.segments[index][0]
        some_keys, some_values = halo.before(index)
        outer.append(
            call.run(
                edge,
                torch.cat((*some_keys, keys[index][: len(edge)])),
                torch.cat((*some_values, values[index][: len(edge)])),
                max(0, start - reach),
                start + len(edge),
            )
        )
    halo.finish()
    return torch.cat([part for pair in zip(outer, inner, strict=True) for part in pair])


def _by_heads(q: Tensor, k: Tensor, v: Tensor, call: ShardedCall) -> Tensor:
    shards, axis = call.shards, call.shards.axis
    ranks, here = axis.size, len(q)
    # [ranks, seq_local, batch, heads / ranks and two times the key heads of these, head_dim]
    by_rank = torch.cat([_for_ranks(x, ranks) for x in (q, k, v)], dim=3)
    even = (here,) * ranks
    whole = shards.join(all_to_all(by_rank.flatten(0, 1), even, even, axis))
    heads = q.shape[2] // ranks
    kv_heads = (whole.shape[2] - heads) // 2
    whole_q, whole_k, whole_v = whole.split((heads, kv_heads, kv_heads), dim=2)
    these = slice(axis.rank * heads, (axis.rank + 1) * heads)
    out = call.run(whole_q, whole_k, whole_v, 0, shards.length, these)
    back = all_to_all(shards.part(out), even, even, axis).unflatten(0, (ranks, here))
    return back.permute(1, 2, 0, 3, 4).flatten(2, 3)


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
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if gradients:
        return _AttendGathered.apply(q, k, v, call.whole.sinks, call)
    group = q.shape[2] // k.shape[2]
    outs = []
    for head, keys, values in _gathered(k, v, call):
        of_head = slice(head * group, (head + 1) * group)
        queries = q[:, :, of_head]
        parts = [
            call.run(queries[some], keys[first:last], values[first:last], first, last, of_head)
            for some, first, last in _segments(call)
        ]
        outs.append(torch.cat(parts))
    return torch.cat(outs, dim=2)


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
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: ShardedCall
    ) -> Tensor:
        group = q.shape[2] // k.shape[2]
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        kept: list[Tensor] = []
        counts: list[int] = []
        for head, keys, values in _gathered(k, v, call):
            of_head = slice(head * group, (head + 1) * group)
            for some, first, last in _segments(call):
                queries, seen = q[some, :, of_head], slice(first, last)
                spec = call.spec(first, last, len(queries), of_head)
                part, needed = attention_forward(
                    queries, keys[seen], values[seen], spec, call.kernel
                )
                out[some, :, of_head] = part
                kept += needed
                counts.append(len(needed))
        ctx.call, ctx.counts = call, counts
        ctx.save_for_backward(q, k, v, out, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call, counts, (q, k, v, out, *kept) = ctx.call, iter(ctx.counts), ctx.saved_tensors
        grad, group = grads[0], q.shape[2] // k.shape[2]
        by_q, by_k, by_v = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)
        )
        sinks = call.whole.sinks
        by_sinks = None if sinks is None else torch.zeros_like(sinks)
        for head, keys, values in _gathered(k, v, call):
            of_head = slice(head * group, (head + 1) * group)
            both = keys.new_zeros(len(keys), keys.shape[1], 2, keys.shape[3])
            for some, first, last in _segments(call):
                count, seen = next(counts), slice(first, last)
                needed, kept = tuple(kept[:count]), kept[count:]
                spec = call.spec(first, last, some.stop - some.start, of_head)
                by_queries, by_keys, by_values, of_sinks = attention_backward(
                    grad[some, :, of_head],
                    q[some, :, of_head],
                    keys[seen],
                    values[seen],
                    out[some, :, of_head],
                    needed,
                    spec,
                    call.kernel,
                )
                by_q[some, :, of_head] = by_queries
                both[seen, :, :1] += by_keys
                both[seen, :, 1:] += by_values
                if by_sinks is not None and of_sinks is not None:
                    by_sinks[of_head] += of_sinks
            by_k[:, :, head : head + 1], by_v[:, :, head : head + 1] = return_gradients(
                call.shards.part(both), call.shards.axis
            )
        return by_q, by_k, by_v, by_sinks, None
