"""What the fused kernels of a CUDA device have in common: where they can run, and how far they
reach."""

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16)


def fused_refusal(
    device: torch.device, dtype: torch.dtype, head_dim: int, largest_head_dim: int
) -> str | None:
    """Return why a fused kernel with heads up to this size cannot run there, or None."""
    if device.type != "cuda":
        return f"needs a CUDA device (device={device.type})"
    if dtype not in DTYPES:
        return f"computes in bf16 or fp16 only (dtype={dtype})"
    if head_dim > largest_head_dim or head_dim % 8:
        return f"needs head_dim a multiple of 8 up to {largest_head_dim} (head_dim={head_dim})"
    return None


def within_int32_offsets(x: Tensor) -> Tensor:
    """Return x, or a copy where its elements lie 2³¹ and more apart though they would fit in less,
    as a slice of wide rows: values of the 1B shape from 110,378 tokens on.

    FlexAttention multiplies a token's index by its step in 32 bits (its code for torch 2.11 does;
    github.com/pytorch/pytorch/issues/190857), and cuDNN may count what holds fewer in as many.
    """
    reach = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return x if reach < 2**31 else x.contiguous()
