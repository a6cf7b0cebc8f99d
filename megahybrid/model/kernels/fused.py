"""What the fused kernels of a CUDA device have in common: where they can run."""

import torch

DTYPES = (torch.bfloat16, torch.float16)


def fused_refusal(
    device: torch.device, dtype: torch.dtype, head_dim: int, largest_head_dim: int
) -> str | None:
    """Why a fused kernel with heads up to `largest_head_dim` cannot run there, or None."""
    if device.type != "cuda":
        return f"needs a CUDA device (device={device.type})"
    if dtype not in DTYPES:
        return f"computes in bf16 or fp16 only (dtype={dtype})"
    if head_dim > largest_head_dim or head_dim % 8:
        return f"needs head_dim a multiple of 8 up to {largest_head_dim} (head_dim={head_dim})"
    return None
