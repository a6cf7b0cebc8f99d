"""Windowed attention on a CPU by plain products: a tile of queries against the keys it can see.

A tile is few queries of all heads that share a key head, so the products have many rows while few
keys outside of the windows are read; its scores stay in the processor's cache. Nothing is kept for
backward but the heads themselves: a tile's probabilities are computed again there.
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
) -> Float[Tensor, "seq batch heads head_dim"]:
    """Attention to the last `window` keys, tile by tile; the queries are the last of the tokens of
    the keys."""
    firsts = None
    if documents is not None:
        firsts = documents.keep(("tiles",), lambda: documents.starts.cpu())
    return _Tiles.apply(q, k, v, window, firsts, scale)


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int, starts: Tensor | None, scale: float
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.window, ctx.starts, ctx.scale = window, starts, scale
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        queries, attention_output = _of_one_key_head(q, k), _of_one_key_head(q, k)
        scores = _Scores(q, k, window)
        for row, head, heads in _each_key_head(q, k):
            torch.mul(q[:, row, heads], scale, out=queries)
            keys, values = k[:, row, head].contiguous(), v[:, row, head].contiguous()
            for tile, seen, masks in _tiles(q, k, window, starts, row):
                some = queries[tile].flatten(0, 1)
                weights = scores.softmax(some, keys[seen], masks)
                torch.mm(weights, values[seen], out=attention_output[tile].flatten(0, 1))
            out[:, row, heads] = attention_output
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        by_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        by_k, by_v = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v))
        queries, grad, of_queries = (_of_one_key_head(q, k) for _ in range(3))
        scores, grad_scores = _Scores(q, k, ctx.window), _Scores(q, k, ctx.window)
        for row, head, heads in _each_key_head(q, k):
            torch.mul(q[:, row, heads], ctx.scale, out=queries)
            grad.copy_(grads[0][:, row, heads])
            keys, values = k[:, row, head].contiguous(), v[:, row, head].contiguous()
            of_keys, of_values = by_k[:, row, head], by_v[:, row, head]
            for tile, seen, masks in _tiles(q, k, ctx.window, ctx.starts, row):
                some, incoming = queries[tile].flatten(0, 1), grad[tile].flatten(0, 1)
                seen_keys = keys[seen]
                weights = scores.softmax(some, seen_keys, masks)
                of_values[seen].addmm_(weights.t(), incoming)
                grad_score = torch.mm(incoming, values[seen].t(), out=grad_scores.like(weights))
                torch._softmax_backward_data(
                    grad_score, weights, -1, grad_score.dtype, grad_input=grad_score
                )
                of_keys[seen].addmm_(grad_score.t(), some)
                torch.mm(grad_score, seen_keys, out=of_queries[tile].flatten(0, 1))
            torch.mul(of_queries, ctx.scale, out=by_q[:, row, heads])
        return by_q, by_k, by_v, None, None, None


class _Scores:
    """Memory for the scores of one tile [tile * group, keys], used by all tiles in turn."""

    def __init__(self, q: Tensor, k: Tensor, window: int) -> None:
        rows = TILE * (q.shape[2] // k.shape[2])
        self._memory = q.new_empty(rows * (window + TILE + ALIGNED))

    def like(self, scores: Tensor) -> Tensor:
        """Memory of the shape of `scores`."""
        return self._memory[: scores.numel()].view(scores.shape)

    def softmax(self, queries: Tensor, keys: Tensor, masks: Masks) -> Tensor:
        """The probabilities of the keys."""
        rows, count = len(queries), len(keys)
        scores = torch.mm(queries, keys.t(), out=self._memory[: rows * count].view(rows, count))
        for columns, hidden in masks:
            by_query = scores.view(len(hidden), -1, count)[..., columns]
            by_query.add_(hidden.unsqueeze(1))
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
            masks = [(slice(None), additive(seen, torch.float32))]
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
    masks.append((slice(before, None), torch.zeros(later.shape).masked_fill(later, -torch.inf)))
    return masks
