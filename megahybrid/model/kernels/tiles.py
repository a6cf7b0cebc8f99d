"""Windowed attention on a CPU by plain products: a tile of queries against the keys it can see.

A tile is few queries of all heads that share a key head, so the products have many rows while few
keys outside of the windows are read; its scores stay in the processor's cache. Nothing is kept for
backward but the heads themselves: a tile's probabilities are computed again there.

A learned sink is one more column of a tile's scores, whose key has no value: the softmax, and its
own gradient, give it its share, and the gradient of its score is the sink's.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from megahybrid.model.kernels.documents import Documents, additive, visible

Masks = list[tuple[slice, Tensor]]  # columns of the scores, and what is added to them
Tile = tuple[slice, slice, Masks]

# Queries of a tile, of each head: fewer leave the products' rows unfilled, more read more keys that
# no query of theirs sees.
TILE = 48
# Keys begin at a multiple of this: rows of scores are then whole vectors.
ALIGNED = 16
# Multiply-adds of a tile's products, below which calls cost more than they save.
SMALLEST = 2**21


def serves(q: Tensor, k: Tensor, window: int) -> bool:
    """Return whether tiles are faster: in fp32 on a CPU, for windows that make large products."""
    group = q.shape[2] // k.shape[2]
    large = TILE * group * (window + TILE) * q.shape[3] >= SMALLEST
    return q.device.type == "cpu" and q.dtype == torch.float32 and large


def attend_tiles(
    q: Float[Tensor, "seq batch heads head_dim"],
    k: Float[Tensor, "keys batch kv_heads head_dim"],
    v: Float[Tensor, "keys batch kv_heads head_dim"],
    *,
    window: int,
    documents: Documents | None,
    scale: float,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "seq batch heads head_dim"]:
    """Attention to the last `window` keys, tile by tile; the queries are the last of the tokens of
    the keys. Sinks are learned, one for each query head."""
    firsts = None
    if documents is not None:
        firsts = documents.keep(("tiles",), lambda: documents.starts.cpu())
    return _Tiles.apply(q, k, v, sinks, window, firsts, scale)


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        window: int,
        starts: Tensor | None,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, *(() if sinks is None else (sinks,)))
        ctx.window, ctx.starts, ctx.scale = window, starts, scale
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        queries, attention_output = _of_one_key_head(q, k), _of_one_key_head(q, k)
        scores = _Scores(q, k, window, sinks)
        for row, head, heads in _each_key_head(q, k):
            torch.mul(q[:, row, heads], scale, out=queries)
            scores.take_sinks(heads)
            keys, values = k[:, row, head].contiguous(), v[:, row, head].contiguous()
            for tile, seen, masks in _tiles(q, k, window, starts, row):
                some = queries[tile].flatten(0, 1)
                weights = scores.softmax(some, keys[seen], masks)
                weights = weights[:, : seen.stop - seen.start]
                torch.mm(weights, values[seen], out=attention_output[tile].flatten(0, 1))
            out[:, row, heads] = attention_output
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # asked for once, as recomputation allows
        (q, k, v), (sinks,) = saved[:3], saved[3:] or (None,)
        by_sinks = None if sinks is None else torch.zeros_like(sinks)
        by_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        by_k, by_v = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v))
        queries, grad, of_queries = (_of_one_key_head(q, k) for _ in range(3))
        scores, grad_scores = (_Scores(q, k, ctx.window, sinks) for _ in range(2))
        for row, head, heads in _each_key_head(q, k):
            torch.mul(q[:, row, heads], ctx.scale, out=queries)
            scores.take_sinks(heads)
            grad.copy_(grads[0][:, row, heads])
            keys, values = k[:, row, head].contiguous(), v[:, row, head].contiguous()
            of_keys, of_values = by_k[:, row, head], by_v[:, row, head]
            for tile, seen, masks in _tiles(q, k, ctx.window, ctx.starts, row):
                some, incoming = queries[tile].flatten(0, 1), grad[tile].flatten(0, 1)
                seen_keys, count = keys[seen], seen.stop - seen.start
                weights = scores.softmax(some, seen_keys, masks)
                of_values[seen].addmm_(weights[:, :count].t(), incoming)
                of_weights = grad_scores.like(weights)
                grad_score = torch.mm(incoming, values[seen].t(), out=of_weights[:, :count])
                of_weights[:, count:] = 0  # a sink has no value
                torch._softmax_backward_data(
                    of_weights, weights, -1, of_weights.dtype, grad_input=of_weights
                )
                if by_sinks is not None:
                    of_sinks = of_weights[:, count].view(tile.stop - tile.start, -1)
                    by_sinks[heads] += of_sinks.sum(0)
                of_keys[seen].addmm_(grad_score.t(), some)
                torch.mm(grad_score, seen_keys, out=of_queries[tile].flatten(0, 1))
            torch.mul(of_queries, ctx.scale, out=by_q[:, row, heads])
        return by_q, by_k, by_v, by_sinks, None, None, None


class _Scores:
    """Memory for the scores of one tile [tile * group, keys], used by all tiles in turn; behind the
    keys of each row, where there are sinks, the row's own and what fills a vector."""

    def __init__(self, q: Tensor, k: Tensor, window: int, sinks: Tensor | None) -> None:
        rows = TILE * (q.shape[2] // k.shape[2])
        self._columns = 0 if sinks is None else ALIGNED
        self._of_heads = q.new_full((q.shape[2], self._columns), -torch.inf)
        if sinks is not None:
            self._of_heads[:, 0] = sinks
        self._sinks = self._of_heads
        self._memory = q.new_empty(rows * (window + TILE + ALIGNED + self._columns))

    def take_sinks(self, heads: slice) -> None:
        """Use the sinks of these query heads, if there are any, for the tiles that follow."""
        self._sinks = self._of_heads[heads]

    def like(self, scores: Tensor) -> Tensor:
        """Memory of the shape of `scores`."""
        return self._memory[: scores.numel()].view(scores.shape)

    def softmax(self, queries: Tensor, keys: Tensor, masks: Masks) -> Tensor:
        """The probabilities of the keys, then, in columns of their own, of the sinks."""
        rows, count = len(queries), len(keys)
        wide = count + self._columns
        scores = self._memory[: rows * wide].view(rows, wide)
        torch.mm(queries, keys.t(), out=scores[:, :count])
        for columns, hidden in masks:
            by_query = scores.view(len(hidden), -1, wide)[..., columns]
            by_query.add_(hidden.unsqueeze(1))
        if self._columns:
            scores.view(-1, len(self._sinks), wide)[..., count:] = self._sinks
        return torch._softmax(scores, -1, False, out=scores)


def _each_key_head(q: Tensor, k: Tensor) -> Iterator[tuple[int, int, slice]]:
    """(row, key head, its query heads), one after the other."""
    group = q.shape[2] // k.shape[2]
    for row in range(q.shape[1]):
        for head in range(k.shape[2]):
            yield row, head, slice(head * group, (head + 1) * group)


def _of_one_key_head(q: Tensor, k: Tensor) -> Tensor:
    """Memory for the query heads of one key head, [seq, group, head_dim]."""
    return q.new_empty(q.shape[0], q.shape[2] // k.shape[2], q.shape[3])


def _tiles(q: Tensor, k: Tensor, window: int, starts: Tensor | None, row: int) -> Iterator[Tile]:
    """(its queries, keys that it reads, masks of some of these) of each tile of a row."""
    of_row = None if starts is None else starts[row]
    before = len(k) - len(q)
    for first in range(before, len(k), TILE):  # as a token; query 0 is token `before`
        last = min(first + TILE, len(k))
        queries = slice(first - before, last - before)
        begin = max(0, first - window + 1) // ALIGNED * ALIGNED
        if of_row is None:
            yield (
                queries,
                slice(begin, last),
                _edges(last - first, first - begin, window),
            )
            continue
        # A document's start never falls along a row: what lies before the first query's, no query
        # of the tile sees.
        begin = max(begin, int(of_row[first]) // ALIGNED * ALIGNED)
        if int(of_row[last - 1]) <= begin:
            yield (
                queries,
                slice(begin, last),
                _edges(last - first, first - begin, window),
            )
        else:
            seen = visible(of_row[None], first, last, begin, last, window)[0]
            masks = [(slice(0, last - begin), additive(seen, torch.float32))]
            yield queries, slice(begin, last), masks


@lru_cache(maxsize=4096)
def _edges(queries: int, before: int, window: int) -> Masks:
    """Masks of one document's tile with `before` keys ahead of its first query: at the keys of the
    tile itself, and at those that its later queries no longer see."""
    query = torch.arange(queries)[:, None]
    masks = []
    leaving = before + queries - window
    if leaving > 0:
        lost = torch.arange(leaving) <= query + before - window
        masks.append((slice(0, leaving), torch.zeros(lost.shape).masked_fill(lost, -torch.inf)))
    later = torch.arange(queries) > query
    own = slice(before, before + queries)
    masks.append((own, torch.zeros(later.shape).masked_fill(later, -torch.inf)))
    return masks
