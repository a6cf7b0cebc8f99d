"""FlashAttention 3 and 4 where their packages are installed: the same call as torch's varlen."""

import importlib
import importlib.util
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from megahybrid.model.kernels.cuda_limits import fused_refusal
from megahybrid.model.kernels.kernel import Kernel, Measured
from megahybrid.model.kernels.spec import AttentionSpec
from megahybrid.model.kernels.varlen import pack

# Built from its repository; from a wheel of flash-attn-4.
MODULES = {"fa3": "flash_attn_interface", "fa4": "flash_attn.cute.interface"}
LARGEST_HEAD_DIM = {"fa3": 256, "fa4": 128}


def refusal(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why this kernel cannot run there, or None if it can."""
    why_not = fused_refusal(device, dtype, head_dim, LARGEST_HEAD_DIM[name])
    if why_not:
        return why_not
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "needs a Hopper device or newer"
    return None if _function(name) is not None else f"needs the package of {MODULES[name]}"


def attend_flash(
    name: str,
    q: Float[Tensor, "seq batch heads head_dim"],
    k: Float[Tensor, "keys batch kv_heads head_dim"],
    v: Float[Tensor, "keys batch kv_heads head_dim"],
    spec: AttentionSpec,
) -> Float[Tensor, "seq batch heads head_dim"]:
    """Attention over the documents of all rows as one packed batch."""
    function, window, (seq, batch) = _function(name), spec.window, q.shape[:2]
    packing = pack(q, k, spec)
    none = None if name == "fa4" else -1
    out: Any = function(
        packing.queries_of(q),
        packing.keys_of(k),
        packing.keys_of(v),
        cu_seqlens_q=packing.queries,
        cu_seqlens_k=packing.keys,
        max_seqlen_q=packing.longest_queries,
        max_seqlen_k=packing.longest_keys,
        softmax_scale=spec.scale,
        causal=True,
        # Counts keys before the query's own.
        window_size=(none, none) if window is None else (window - 1, 0),
    )
    out = out[0] if isinstance(out, tuple) else out
    return out.unflatten(0, (batch, seq)).transpose(0, 1)


@cache
def _function(name: str) -> Any:
    """The package's flash_attn_varlen_func; None where it cannot be had."""
    try:
        if importlib.util.find_spec(MODULES[name].split(".")[0]) is None:
            return None
        return importlib.import_module(MODULES[name]).flash_attn_varlen_func
    except (ImportError, AttributeError, OSError):
        return None


def _kernel(name: str) -> Kernel:
    return Kernel(
        name,
        lambda q, k, v, spec: attend_flash(name, q, k, v, spec),
        serves=frozenset({"window", "documents", "before"}),
        unavailable=lambda spec, place: refusal(name, *place[:3]),
        measured=Measured.FUSED,
    )


FA3, FA4 = _kernel("fa3"), _kernel("fa4")
