"""Windowed attention from plain SDPA: blocks of queries against the few key blocks they can see.

Time and memory are linear in the length, and it runs wherever SDPA runs.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from megahybrid.model.kernels import sdpa, tiles
from megahybrid.model.kernels.documents import Documents, additive, visible
from megahybrid.model.kernels.kernel import Kernel, Measured
from megahybrid.model.kernels.last_queries import attend_last
from megahybrid.model.kernels.sdpa import attend_heads, attend_sdpa
from megahybrid.model.kernels.sinks import heads_with_sinks
from megahybrid.model.kernels.spec import AttentionSpec, Place

# Small blocks waste least: a query block reads window + block keys. Below 64 rows SDPA's own tiles
# go unfilled, above 512 nothing is gained.
SMALLEST_BLOCK, LARGEST_BLOCK = 64, 512


def attend_blocked(
    q: Float[Tensor, "seq batch heads head_dim"],
    k: Float[Tensor, "keys batch kv_heads head_dim"],
    v: Float[Tensor, "keys batch kv_heads head_dim"],
    spec: AttentionSpec,
) -> Float[Tensor, "seq batch heads head_dim"]:
    """Attention to the last `window` keys, in blocks.

    The first tokens, which no full set of key blocks precedes, are one dense call (the head); the
    others are blocks of queries against their own and `reach` earlier key blocks (the tail). Large
    ones in fp32 on a CPU are smaller blocks of their own products instead (`tiles`). Blocks are
    counted from the first key, so keys before the first query shorten the head.
    """
    window, documents, scale, sinks = spec.window, spec.documents, spec.scale, spec.sinks
    if window is None:
        return attend_sdpa(q, k, v, spec)  # one block: no bands
    unseen = max(len(k) - len(q) - (window - 1), 0)
    if unseen:
        k, v = k[unseen:], v[unseen:]
        documents = documents and documents.stretch(documents.seq - len(k), documents.seq)
    if tiles.serves(q, k, window):
        return tiles.attend_tiles(
            q, k, v, window=window, documents=documents, scale=scale, sinks=sinks
        )
    seq, batch, heads, head_dim = q.shape
    if documents is None:
        # One mask serves all rows, so rows can pass for heads: [seq, 1, batch * heads, head_dim].
        # Query head h of row b is b * heads + h, its group's KV head b * kv_heads + h // group.
        q, k, v = (x.reshape(len(x), 1, -1, head_dim) for x in (q, k, v))
        sinks = sinks.repeat(batch) if sinks is not None else None
    block, reach = block_and_reach(window)
    before = len(k) - seq
    head = min(max(block * reach - before, 0), seq)
    parts = []
    if head:
        of_head = slice(0, before + head)
        parts.append(_head(q[:head], k[of_head], v[of_head], window, documents, scale, sinks))
    if head < seq:
        parts.append(_tail(q[head:], k, v, window, documents, scale, sinks))
    return torch.cat(parts).reshape(seq, batch, heads, head_dim)


def block_and_reach(window: int) -> tuple[int, int]:
    """Block length in tokens, and how many blocks before its own a query can see into."""
    block = min(max(-(-window // 4), SMALLEST_BLOCK), LARGEST_BLOCK)
    return block, max(-(-(window - 1) // block), 1)


def _head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    documents: Documents | None,
    scale: float,
    sinks: Tensor | None,
) -> Tensor:
    length, before = len(k), len(k) - len(q)
    mask = None
    if documents is not None:
        mask = documents.keep(
            ("blocked head", window, before, q.dtype),
            lambda: additive(visible(documents.starts, before, length, 0, length, window), q.dtype),
        )[:, None]
    elif length > window:
        mask = _plain_mask(before, len(q), length, window, q.dtype, q.device)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))  # [rows, heads, length, head_dim]
    if sinks is not None:
        return heads_with_sinks(q, k, v, mask, scale, sinks).permute(2, 0, 1, 3)
    if mask is None and before:
        return attend_last(q, k, v, scale).permute(2, 0, 1, 3)
    return attend_heads(q, k, v, mask, scale).permute(2, 0, 1, 3)


def _tail(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    documents: Documents | None,
    scale: float,
    sinks: Tensor | None,
) -> Tensor:
    block, reach = block_and_reach(window)
    length, rows = q.shape[:2]
    blocks = -(-length // block)
    q = F.pad(q, (0, 0, 0, 0, 0, 0, 0, blocks * block - length))
    q = q.unflatten(0, (blocks, block)).permute(2, 0, 3, 1, 4).flatten(0, 1)
    k, v = (_OverlappingBlocks.apply(x, blocks, block, reach).flatten(0, 1) for x in (k, v))
    # q is [rows * blocks, heads, block, head_dim], k and v [… , kv_heads, (reach + 1) * block, …]
    if documents is None:
        mask = _plain_mask(reach * block, block, (reach + 1) * block, window, q.dtype, q.device)
    else:
        mask = documents.keep(
            ("blocked tail", window, q.dtype), lambda: _tail_masks(documents, window, q.dtype)
        )
    if sinks is None:
        out = attend_heads(q, k, v, mask, scale)
    else:
        # Each query's softmax lies in one block, and with it the sink.
        out = heads_with_sinks(q, k, v, mask, scale, sinks)
    out = out.unflatten(0, (rows, blocks)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    return out[:length]


@lru_cache(maxsize=32)
def _plain_mask(
    first_query: int, queries: int, keys: int, window: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Causal band for rows of one document, [queries, keys]; the same for every block and batch."""
    starts = torch.zeros(1, first_query + queries, dtype=torch.int64, device=device)
    return additive(visible(starts, first_query, first_query + queries, 0, keys, window)[0], dtype)


def _tail_masks(documents: Documents, window: int, dtype: torch.dtype) -> Tensor:
    """Band and documents for every tail block, [rows * blocks, 1, block, (reach + 1) * block]."""
    block, reach = block_and_reach(window)
    rows, seq = documents.starts.shape
    blocks = -(-seq // block) - reach
    padding = (reach + blocks) * block - seq
    # A padded query sees its whole band: a row of nothing but -inf would be NaN.
    starts = F.pad(documents.starts, (0, padding))[:, reach * block :]
    key = torch.arange(blocks, device=starts.device)[:, None, None] * block
    key = key + torch.arange((reach + 1) * block, device=starts.device)
    in_document = key >= starts.reshape(rows, blocks, block, 1)
    band = _plain_mask(reach * block, block, (reach + 1) * block, window, dtype, starts.device)
    return band.where(in_document, float("-inf")).flatten(0, 1)[:, None]


class _OverlappingBlocks(torch.autograd.Function):
    """[seq, rows, heads, head_dim] -> [rows, blocks, heads, (reach + 1) * block, head_dim].

    Forward is a view of the padded input; Tensor.unfold's own backward is several times slower
    than the reach + 1 additions below.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: int, block: int, reach: int) -> Tensor:
        ctx.seq, ctx.blocks, ctx.block, ctx.reach = x.shape[0], blocks, block, reach
        padded = F.pad(x, (0, 0, 0, 0, 0, 0, 0, (blocks + reach) * block - x.shape[0]))
        step, row, head, dim = padded.stride()
        return padded.as_strided(
            (x.shape[1], blocks, x.shape[2], (reach + 1) * block, x.shape[3]),
            (row, block * step, head, step, dim),
            padded.storage_offset(),
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        rows, blocks, heads, _, head_dim = grad.shape
        total = grad.new_zeros(blocks + ctx.reach, ctx.block, rows, heads, head_dim)
        by_block = grad.unflatten(3, (ctx.reach + 1, ctx.block)).permute(3, 1, 4, 0, 2, 5)
        for offset in range(ctx.reach + 1):
            total[offset : offset + blocks] += by_block[offset]
        return total.flatten(0, 1)[: ctx.seq], None, None, None


def _unavailable(spec: AttentionSpec, place: Place) -> str | None:
    """Without a window it is SDPA, which has sums to put sinks beside in half precision alone, on
    CUDA."""
    if spec.sinks is None or spec.window or sdpa.sums(place) is not None:
        return None
    return f"has no learned sinks without a window, there (dtype={place.dtype})"


# On a GPU its masks cost more than its products: it serves windows where nothing else does.
KERNEL = Kernel(
    "blocked",
    attend_blocked,
    serves=frozenset({"window", "documents", "before", "sinks"}),
    unavailable=lambda spec, place: _unavailable(spec, place),
    rank=lambda spec: 4,
    measured=Measured.LAST,
    halves=lambda spec, place: None if spec.window else sdpa.halves(place),
    sums=lambda spec, place: None if spec.window else sdpa.sums(place),
)
