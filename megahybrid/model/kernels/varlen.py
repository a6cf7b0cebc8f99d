"""torch's bundled FlashAttention over packed documents: window, documents and GQA in one kernel."""

import inspect
from functools import cache, lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from megahybrid.errors import ConfigError
from megahybrid.model.kernels.documents import Documents, Span, sent
from megahybrid.model.kernels.fused import fused_refusal

LARGEST_HEAD_DIM = 256


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this kernel cannot run there, or None if it can."""
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
    *,
    window: int | None,
    documents: Documents | None,
    scale: float,
) -> Float[Tensor, "seq batch heads head_dim"]:
    """Attention over the documents of all rows as one packed batch."""
    why_not = refusal(q.device, q.dtype, q.shape[-1])
    if why_not:
        raise ConfigError(f"kernels=varlen {why_not}. Use sdpa or blocked.")
    from torch.nn.attention.varlen import varlen_attn

    seq, batch, heads = q.shape[:3]
    if documents is None:
        boundaries, longest = plain_boundaries(batch, seq, q.device), seq
    else:
        boundaries, longest = documents.keep("varlen", lambda: packed_boundaries(documents))
    packed_q, packed_k, packed_v = (x.transpose(0, 1).flatten(0, 1) for x in (q, k, v))
    options: dict[str, Any] = {"scale": scale}
    if "enable_gqa" in _parameters():
        options["enable_gqa"] = k.shape[2] != heads
    else:
        packed_k, packed_v = (
            x.repeat_interleave(heads // k.shape[2], dim=1) for x in (packed_k, packed_v)
        )
    # FlashAttention's left counts keys before the query's own.
    left = -1 if window is None else window - 1
    out: Any = varlen_attn(
        packed_q,
        packed_k,
        packed_v,
        boundaries,
        boundaries,
        longest,
        longest,
        window_size=(left, 0),
        **options,
    )
    return out.unflatten(0, (batch, seq)).transpose(0, 1)


@lru_cache(maxsize=16)
def plain_boundaries(batch: int, seq: int, device: torch.device) -> Tensor:
    """Those of rows of one document each, int32 [batch + 1]: the same for every batch."""
    return torch.arange(0, batch * seq + 1, seq, dtype=torch.int32, device=device)


def packed_boundaries(documents: Documents) -> tuple[Tensor, int]:
    """Cumulative document lengths, int32 [documents + 1], rows one behind the other; and the
    longest document."""
    spans: list[Span] = documents.spans()
    ends = [span.row * documents.seq + span.stop for span in spans]
    boundaries = torch.tensor([0, *ends], dtype=torch.int32)
    return sent(boundaries, documents.device), max(span.stop - span.start for span in spans)


@cache
def _parameters() -> frozenset[str]:
    """What this torch's varlen_attn accepts: 2.10 knew neither windows nor grouped heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)
