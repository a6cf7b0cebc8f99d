"""Full attention of queries that are the last tokens of their keys, on [batch, heads, tokens,
head_dim].

SDPA's causal mask is laid against the first key, so that it would hide the wrong ones here, and a
mask that says it right is queries × keys. Neither is used: on a CPU two calls of torch's flash
kernel, on CUDA kernels whose causal mask is laid against the last key.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megahybrid.model.kernels import cuda_limits
from megahybrid.model.kernels.documents import additive, visible

LARGEST_MASK = 2**22  # bytes of a mask of queries × keys, where no kernel does without
FROM_THE_LAST_KEY = 2  # CausalVariant.LOWER_RIGHT of torch.nn.attention.bias
LARGEST_HEAD_DIM = 256  # of torch's FlashAttention


def attend_last(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q kᵀ) v, where query i of n sees all but the last n - 1 - i keys; there are
    more keys than queries, and heads may share them."""
    if q.device.type == "cpu":
        out: Tensor = _OnCpu.apply(q, k, v, scale)
        return out
    if q.device.type != "cuda" or q.dtype == torch.float64:
        return _in_bands(q, k, v, scale)
    head_dim = q.shape[-1]
    q, k, v = (F.pad(x, (0, -head_dim % 8)) if head_dim % 8 else x for x in (q, k, v))
    if q.dtype in cuda_limits.DTYPES and q.shape[-1] <= LARGEST_HEAD_DIM and _has_flash(q.device):
        found: Any = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, is_causal=True, scale=scale
        )
        return found[0][..., :head_dim]  # type: ignore[no-any-return]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    found = torch.ops.aten._efficient_attention_forward(
        *(x.transpose(1, 2) for x in (q, k, v)),
        bias=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        dropout_p=0.0,
        custom_mask_type=FROM_THE_LAST_KEY,
        compute_log_sumexp=torch.is_grad_enabled(),
        scale=scale,
    )
    return found[0].transpose(1, 2)[..., :head_dim]  # type: ignore[no-any-return]


def _has_flash(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _in_bands(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same by SDPA under masks of few queries each, where no kernel has the rule: in float64 on
    CUDA, where SDPA writes all scores out anyway."""
    queries, keys = q.shape[2], k.shape[2]
    band = max(LARGEST_MASK // (keys * q.element_size()), 1)
    starts = torch.zeros(1, keys, dtype=torch.int64, device=q.device)
    outs = []
    for first in range(0, queries, band):
        last = min(first + band, queries)
        seen = keys - queries + last
        mask = additive(visible(starts, seen - (last - first), seen, 0, seen, None), q.dtype)
        part = F.scaled_dot_product_attention(
            q[:, :, first:last],
            k[:, :, :seen],
            v[:, :, :seen],
            attn_mask=mask[:, None],
            scale=scale,
            enable_gqa=True,
        )
        outs.append(part)
    return torch.cat(outs, dim=2)


class _OnCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, sums = forward_on_cpu(q, k, v, None, scale)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        q, k, v, out, sums = ctx.saved_tensors
        return *backward_on_cpu(grad_output, q, k, v, out, sums, None, ctx.scale), None


def forward_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output, and the logarithm of each query's sum [batch, heads, queries]; by a mask
    that is added to the scores, or else as `attend_last`, for as many keys as queries too."""
    early = 0 if mask is not None else k.shape[2] - q.shape[2]
    own_k, own_v = k[:, :, early:], v[:, :, early:]
    out, sums = _flash(q, own_k, own_v, mask, scale, causal=mask is None)
    if not early:
        return out, sums
    early_out, early_sums = _flash(q, k[:, :, :early], v[:, :, :early], None, scale, causal=False)
    share = torch.sigmoid(sums - early_sums)[..., None]  # of the own keys in both sums
    merged = torch.lerp(early_out.to(sums.dtype), out.to(sums.dtype), share)
    return merged.to(q.dtype), torch.logaddexp(early_sums, sums)


def backward_on_cpu(
    grad_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v.

    A kernel's backward makes its probabilities again from the scores and the sums: with the sums of
    all keys, those of a part of the keys are right, and so are the gradients that come from them.
    """
    early = 0 if mask is not None else k.shape[2] - q.shape[2]

    def part(keys: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        found: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_readable(x) for x in (grad_output, q, k[:, :, keys], v[:, :, keys], out)),
            sums,
            0.0,
            causal,
            attn_mask=mask,
            scale=scale,
        )
        return found  # type: ignore[no-any-return]

    by_q, by_k, by_v = part(slice(early, None), mask is None)
    if not early:
        return by_q, by_k, by_v
    early_by_q, early_by_k, early_by_v = part(slice(0, early), False)
    return (
        by_q + early_by_q,
        torch.cat((early_by_k, by_k), dim=2),
        torch.cat((early_by_v, by_v), dim=2),
    )


def _flash(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    found: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_readable(x) for x in (q, k, v)), 0.0, causal, attn_mask=mask, scale=scale
    )
    return found  # type: ignore[no-any-return]


def _readable(x: Tensor) -> Tensor:
    """x, or a copy where the values of a head do not lie side by side: SDPA looks for that, the
    kernel itself does not and reads others."""
    return x if x.stride(-1) == 1 else x.contiguous()
