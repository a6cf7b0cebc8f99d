"""torch's FlexAttention, compiled, with a block mask for window and documents."""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from megahybrid.model.compiled import prepare_compiler
from megahybrid.model.kernels.cuda_limits import within_int32_offsets
from megahybrid.model.kernels.kernel import Kernel, Measured
from megahybrid.model.kernels.spec import AttentionSpec

BLOCK = 128  # tokens; FlexAttention's own
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why this kernel cannot train there, or None if it can."""
    if device.type != "cuda":
        return f"has a backward on CUDA only (device={device.type})"
    if dtype not in DTYPES:
        return f"computes in bf16, fp16 or fp32 only (dtype={dtype})"
    if head_dim < 16:
        return f"needs head_dim of at least 16 (head_dim={head_dim})"
    return None


def attend_flex(
    q: Float[Tensor, "seq batch heads head_dim"],
    k: Float[Tensor, "keys batch kv_heads head_dim"],
    v: Float[Tensor, "keys batch kv_heads head_dim"],
    spec: AttentionSpec,
) -> Float[Tensor, "seq batch heads head_dim"]:
    """Attention by a compiled kernel; on CPU without gradients only."""
    records = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    seq, window, documents, scale = len(k), spec.window, spec.documents, spec.scale
    before = spec.before or 0
    if documents is None:
        mask = _plain_mask(window, seq, q.device, before)
    else:
        mask = documents.keep(
            ("flex", window, before),
            lambda: _block_mask(window, seq, documents.starts, q.device, before),
        )
    if not records:
        q, k, v = (x.detach() for x in (q, k, v))  # on CPU it refuses leaves even under no_grad
    q, k, v = (within_int32_offsets(x.transpose(0, 1)) for x in (q, k, v))
    return _compiled()(q, k, v, mask, scale).transpose(0, 1)


# It is compiled again for every window and length, minutes at each start, and has never been the
# fastest where a fused kernel serves. In fp32 no fused kernel does, and a tiny run on a GPU would
# wait for the compiler longer than it trains.
KERNEL = Kernel(
    "flex",
    attend_flex,
    serves=frozenset({"window", "documents", "before"}),
    unavailable=lambda spec, place: (
        refusal(*place[:3]) if place.gradients or place.device.type == "cuda" else None
    ),
    rank=lambda spec: 3,
    measured=Measured.COMPILED,
    unchosen=frozenset({torch.float32}),
)


@lru_cache(maxsize=32)
def _plain_mask(window: int | None, seq: int, device: torch.device, before: int = 0) -> Any:
    return _block_mask(window, seq, None, device, before)


def _block_mask(
    window: int | None, seq: int, starts: Tensor | None, device: torch.device, before: int = 0
) -> Any:
    """torch's BlockMask of what each block of queries sees of each block of `seq` keys; query 0 is
    token `before`.

    Not by create_block_mask, which makes the whole mask to look at it: 16 GiB at 128k tokens. A
    query sees the keys from `first` to its own, and `first` never falls from one query to the next,
    so a block's first and last query tell.
    """
    from torch.nn.attention.flex_attention import BlockMask

    reach = seq if window is None else window
    begin = torch.arange(0, seq, BLOCK, device=device)
    end = (begin + BLOCK - 1).clamp(max=seq - 1)
    of_query = torch.arange(before, seq, BLOCK, device=device)  # the token of a block's first
    last_query = (of_query + BLOCK - 1).clamp(max=seq - 1)
    first, last = (
        (at - reach + 1).clamp(min=0)[None]
        if starts is None
        else torch.maximum(at - reach + 1, starts[:, at])
        for at in (of_query, last_query)
    )  # [rows, blocks]: the first key of a block's first query, and of its last
    # [rows, query blocks, key blocks]
    some = (begin <= last_query[:, None]) & (end >= first[..., None])
    whole = (end <= of_query[:, None]) & (begin >= last[..., None])
    # Where queries or keys end early torch looks at each.
    whole &= (of_query + BLOCK <= seq)[:, None] & (begin + BLOCK <= seq)

    def mask(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query = query + before
        seen = (key <= query) & (key > query - reach)
        return seen if starts is None else seen & (key >= starts[row, query])

    return BlockMask.from_kv_blocks(
        *_ordered(some & ~whole),
        *_ordered(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask,
        seq_lengths=(seq - before, seq),
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many key blocks each query block has, and which, those first, int32."""
    blocks = blocks[:, None].int()  # the same for all heads
    order = blocks.argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32), order.int()


@cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> Any:
        # [batch, seq, heads, head_dim] in and out: torch copies an output's gradient that is not
        # contiguous before the backward of a compiled program.
        shares = k.shape[2] != q.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=shares)
        return out.transpose(1, 2)

    prepare_compiler()  # a program for each window and length; beyond torch's limit none is fused
    return torch.compile(attention, dynamic=False)
