"""SDPA held to cuDNN's kernel, which torch takes by itself on Hopper and on few others."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megahybrid.model.kernels.cuda_limits import fused_refusal
from megahybrid.model.kernels.kernel import Kernel, Measured
from megahybrid.model.kernels.sdpa import attend_sdpa
from megahybrid.model.kernels.spec import AttentionSpec
from megahybrid.model.kernels.varlen import attend_varlen, without_varlen

LARGEST_HEAD_DIM = 128


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why this kernel cannot run there, or None if it can."""
    why_not = fused_refusal(device, dtype, head_dim, LARGEST_HEAD_DIM)
    if why_not:
        return why_not
    if torch.cuda.get_device_capability(device) < (8, 0) or not torch.backends.cudnn.is_available():
        return "needs cuDNN and an Ampere device or newer"
    if torch.are_deterministic_algorithms_enabled():
        return "cannot repeat its bits (deterministic=true)"
    return None


def attend_cudnn(
    q: Float[Tensor, "seq batch heads head_dim"],
    k: Float[Tensor, "seq batch kv_heads head_dim"],
    v: Float[Tensor, "seq batch kv_heads head_dim"],
    spec: AttentionSpec,
) -> Float[Tensor, "seq batch heads head_dim"]:
    """`attend_sdpa` by cuDNN; torch raises where it has no kernel for the shape.

    Batches with documents go to varlen: torch would have cuDNN compile a graph for each length.
    """
    if spec.documents is not None:
        return attend_varlen(q, k, v, spec)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return attend_sdpa(q, k, v, spec)


KERNEL = Kernel(
    "cudnn",
    attend_cudnn,
    serves=frozenset({"documents"}),
    unavailable=lambda spec, place: refusal(*place[:3]) or without_varlen(spec, place),
    measured=Measured.ALWAYS,
)
