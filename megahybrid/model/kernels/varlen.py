"""torch's bundled FlashAttention over packed documents: window, documents and GQA in one kernel."""

import inspect
from functools import cache, lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from megahybrid.model.kernels.cuda_limits import fused_refusal
from megahybrid.model.kernels.documents import Documents, Span, to_device
from megahybrid.model.kernels.kernel import Kernel, Measured
from megahybrid.model.kernels.spec import AttentionSpec, Place

LARGEST_HEAD_DIM = 256


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why this kernel cannot run there, or None if it can."""
    why_not = fused_refusal(device, dtype, head_dim, LARGEST_HEAD_DIM)
    if why_not:
        return why_not
    if "window_size" not in _parameters():
        return f"needs window_size in torch's varlen_attn (torch={torch.__version__})"
    return None


def attend_varlen(
    q: Float[Tensor, "seq batch heads head_dim"],
    k: Float[Tensor, "seq batch kv_heads head_dim"],
    v: Float[Tensor, "seq batch kv_heads head_dim"],
    spec: AttentionSpec,
) -> Float[Tensor, "seq batch heads head_dim"]:
    """Attention over the documents of all rows as one packed batch."""
    window, documents, scale = spec.window, spec.documents, spec.scale
    seq, batch, heads = q.shape[:3]
    if documents is None:
        boundaries, longest = plain_boundaries(batch, seq, q.device), seq
    else:
        boundaries, longest = documents.keep("varlen", lambda: packed_boundaries(documents))
    packed_q, packed_k, packed_v = (x.transpose(0, 1).flatten(0, 1) for x in (q, k, v))
    if k.shape[2] != heads and not _shares_heads(q.device, q.dtype):
        packed_k, packed_v = (
            x.repeat_interleave(heads // k.shape[2], dim=1) for x in (packed_k, packed_v)
        )
    # FlashAttention's left counts keys before the query's own.
    left = -1 if window is None else window - 1
    out = _call(packed_q, packed_k, packed_v, boundaries, longest, left, scale)
    return out.unflatten(0, (batch, seq)).transpose(0, 1)


KERNEL = Kernel(
    "varlen",
    attend_varlen,
    serves=frozenset({"window", "documents"}),
    unavailable=lambda spec, place: refusal(*place[:3]),
    rank=lambda spec: 1,
    measured=Measured.FUSED,
)


def without_varlen(spec: AttentionSpec, place: Place) -> str | None:
    """Return why a kernel that hands rows of several documents to this one cannot, or None."""
    why_not = None if spec.documents is None else KERNEL.refusal(spec, place)
    return why_not and f"hands documents to varlen, which {why_not}"


@lru_cache(maxsize=16)
def plain_boundaries(batch: int, seq: int, device: torch.device) -> Tensor:
    """Return the boundaries of rows of one document, int32 [batch + 1]: alike for every batch."""
    return torch.arange(0, batch * seq + 1, seq, dtype=torch.int32, device=device)


def packed_boundaries(documents: Documents) -> tuple[Tensor, int]:
    """Cumulative document lengths, int32 [documents + 1], rows one behind the other; and the
    longest document."""
    spans: list[Span] = documents.spans()
    ends = [span.row * documents.seq + span.stop for span in spans]
    boundaries = torch.tensor([0, *ends], dtype=torch.int32)
    return to_device(boundaries, documents.device), max(span.stop - span.start for span in spans)


def _call(
    q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, longest: int, left: int, scale: float
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scale, "window_size": (left, 0)}
    if "enable_gqa" in _parameters():
        options["enable_gqa"] = k.shape[1] != q.shape[1]
    found: Any = varlen_attn(q, k, v, boundaries, boundaries, longest, longest, **options)
    return found


@cache
def _shares_heads(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether KV heads may be fewer than queries': torch 2.11 has no argument for that but
    looks at nothing either, and its kernel does. Tried once, forward and backward, on 16 tokens:
    heads written out would be read and kept once per query head."""
    if "enable_gqa" in _parameters():
        return True
    generator = torch.Generator(device).manual_seed(0)

    def drawn(heads: int) -> Tensor:
        made = torch.randn(16, heads, 64, device=device, dtype=dtype, generator=generator)
        return made.requires_grad_()

    q, k, v, grad_output = drawn(2), drawn(1), drawn(1), drawn(2).detach()
    boundaries = plain_boundaries(1, 16, device)
    found = []
    # Hooks of its own: a layer under recomputation counts what is saved inside of it.
    own_hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    try:
        with torch.enable_grad(), own_hooks:
            for copies in (1, 2):
                keys, values = (x.repeat_interleave(copies, dim=1) for x in (k, v))
                out = _call(q, keys, values, boundaries, 16, 7, 0.125)
                found.append((out, *torch.autograd.grad(out, (q, k, v), grad_output)))
    except (RuntimeError, ValueError):
        return False
    return all(
        bool((a.float() - b.float()).norm() < 0.02 * b.float().norm())
        for a, b in zip(*found, strict=True)
    )


@cache
def _parameters() -> frozenset[str]:
    """Return what this torch's varlen_attn accepts: 2.10 knew neither windows nor grouped heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)
