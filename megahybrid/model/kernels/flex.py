"""torch's FlexAttention, compiled, with a block mask for window and documents."""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from megahybrid.errors import ConfigError
from megahybrid.model.kernels.documents import Documents

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this kernel cannot train there, or None if it can."""
    if device.type != "cuda":
        return f"has a backward on CUDA only (device={device.type})"
    if dtype not in DTYPES:
        return f"computes in bf16, fp16 or fp32 only (dtype={dtype})"
    if head_dim < 16:
        return f"needs head_dim of at least 16 (head_dim={head_dim})"
    return None


def attend_flex(
    q: Float[Tensor, "seq batch heads head_dim"],
    k: Float[Tensor, "seq batch kv_heads head_dim"],
    v: Float[Tensor, "seq batch kv_heads head_dim"],
    *,
    window: int | None,
    documents: Documents | None,
    scale: float,
) -> Float[Tensor, "seq batch heads head_dim"]:
    """Attention by a compiled kernel; on CPU without gradients only."""
    records = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    why_not = refusal(q.device, q.dtype, q.shape[-1])
    if why_not and (records or q.device.type == "cuda"):
        raise ConfigError(f"kernels=flex {why_not}. Use sdpa or blocked.")
    seq = q.shape[0]
    if documents is None:
        mask = _plain_mask(window, seq, q.device)
    else:
        mask = documents.keep(
            ("flex", window), lambda: _block_mask(window, seq, documents.starts, q.device)
        )
    if not records:
        q, k, v = (x.detach() for x in (q, k, v))  # on CPU it refuses leaves even under no_grad
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    out = _compiled()(q, k, v, block_mask=mask, scale=scale, enable_gqa=k.shape[1] != q.shape[1])
    return out.permute(2, 0, 1, 3)


@lru_cache(maxsize=32)
def _plain_mask(window: int | None, seq: int, device: torch.device) -> Any:
    return _block_mask(window, seq, None, device)


def _block_mask(window: int | None, seq: int, starts: Tensor | None, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    reach = seq if window is None else window
    if starts is None:
        return create_block_mask(
            lambda row, head, query, key: (key <= query) & (key > query - reach),
            None,
            None,
            seq,
            seq,
            device=device,
        )
    return create_block_mask(
        lambda row, head, query, key: (
            (key <= query) & (key > query - reach) & (key >= starts[row, query])
        ),
        starts.shape[0],
        None,
        seq,
        seq,
        device=device,
    )


@cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
