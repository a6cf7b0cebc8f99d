"""Learned sinks around a kernel's own forward and backward.

A query's softmax has one more score, the sink c of its head, whose key has no value: with o and l
the output and the logarithm of the sum without it, l' = logaddexp(l, c) and o' = o exp(l - l').

A fused backward reads the output only in <g, o>, and the sum only in exp(score - l). Given o' and
l' it therefore returns the exact gradients of q, k and v; that of c is -sum exp(c - l') <g, o'>.
Autograd through o * sigmoid(l - c) would not: fused kernels ignore a gradient of l.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from megahybrid.model.kernels.kernel import Halves
from megahybrid.model.kernels.last_queries import backward_on_cpu, forward_on_cpu
from megahybrid.model.kernels.spec import AttentionSpec

Heads = Float[Tensor, "seq batch heads head_dim"]
Sums = Float[Tensor, "batch heads seq"]


def with_sinks(halves: Halves) -> Halves:
    """Return the halves of a kernel with the sinks of a spec; `halves` keep the sums alone."""

    def forward(
        q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        assert spec.sinks is not None
        out, (sums,) = halves.forward(q, k, v, replace(spec, sinks=None))
        sums, share = _joined(sums, spec.sinks)
        return out.mul_(share.permute(2, 0, 1)[..., None]), (sums,)

    def backward(
        grad_output: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        kept: tuple[Tensor, ...],
        spec: AttentionSpec,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return halves.backward(grad_output, q, k, v, out, kept, replace(spec, sinks=None))

    return Halves(forward, backward)


def gradient_of_sinks(
    grad_output: Heads, out: Heads, sums: Sums, sinks: Float[Tensor, " heads"]
) -> Float[Tensor, " heads"]:
    """Return the gradient of the sinks, from the output and the sums that have them in."""
    return _gradient(grad_output.permute(1, 2, 0, 3), out.permute(1, 2, 0, 3), sums, sinks)


def attend_with_sinks(halves: Halves, q: Heads, k: Tensor, v: Tensor, spec: AttentionSpec) -> Heads:
    """Return the attention output under the sinks of `spec`; `halves` are a kernel's own."""
    out: Tensor = _Around.apply(q, k, v, spec.sinks, with_sinks(halves), spec)
    return out


class _Around(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor,
        halves: Halves,
        spec: AttentionSpec,
    ) -> Tensor:
        out, (sums,) = halves.forward(q, k, v, spec)
        ctx.save_for_backward(q, k, v, sinks, out, sums)
        # Without the sinks, whose graph it would hold.
        ctx.halves, ctx.spec = halves, replace(spec, sinks=None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        q, k, v, sinks, out, sums = ctx.saved_tensors
        grads = ctx.halves.backward(grad_output, q, k, v, out, (sums,), ctx.spec)
        return *grads, gradient_of_sinks(grad_output, out, sums, sinks), None, None


def heads_with_sinks(
    q: Float[Tensor, "rows heads queries head_dim"],
    k: Float[Tensor, "rows kv_heads keys head_dim"],
    v: Float[Tensor, "rows kv_heads keys head_dim"],
    mask: Tensor | None,
    scale: float,
    sinks: Float[Tensor, " heads"],
) -> Float[Tensor, "rows heads queries head_dim"]:
    """Attention under a mask that is added to the scores, or causal and laid against the last key.

    On a CPU by torch's flash kernel; elsewhere the scores are written out, so the masks must be of
    few keys.
    """
    if q.device.type == "cpu":
        out: Tensor = _HeadsOnCpu.apply(q, k, v, sinks, mask, scale)
        return out
    return written_out(q, k, v, mask, scale, sinks)


def written_out(
    q: Float[Tensor, "rows heads queries head_dim"],
    k: Float[Tensor, "rows kv_heads keys head_dim"],
    v: Float[Tensor, "rows kv_heads keys head_dim"],
    mask: Tensor | None,
    scale: float,
    sinks: Float[Tensor, " heads"],
) -> Float[Tensor, "rows heads queries head_dim"]:
    """The same with a softmax that has the sink as a last column, in fp32 or better."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).unflatten(1, (k.shape[1], -1))  # [rows, kv_heads, group, queries, …]
    scores = (grouped * scale) @ k.to(wide)[:, :, None].transpose(-1, -2)
    scores = scores.flatten(1, 2)
    if mask is None:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(~seen.tril(k.shape[2] - q.shape[2]), -torch.inf)
    else:
        scores = scores + mask
    weights = softmax_with_sinks(scores, sinks)[..., :-1].unflatten(1, (k.shape[1], -1))
    return (weights @ v.to(wide)[:, :, None]).flatten(1, 2).to(q.dtype)


def softmax_with_sinks(
    scores: Float[Tensor, "rows heads queries keys"], sinks: Float[Tensor, " heads"]
) -> Float[Tensor, "rows heads queries keys_and_sink"]:
    """Return what each key gets, and last what the sink gets."""
    column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat((scores, column), dim=-1).softmax(-1)


class _HeadsOnCpu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        out, sums = forward_on_cpu(q, k, v, mask, scale)
        sums, share = _joined(sums, sinks)
        out.mul_(share[..., None])
        ctx.save_for_backward(q, k, v, sinks, out, sums)
        ctx.mask, ctx.scale = mask, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        q, k, v, sinks, out, sums = ctx.saved_tensors
        grads = backward_on_cpu(grad_output, q, k, v, out, sums, ctx.mask, ctx.scale)
        return *grads, _gradient(grad_output, out, sums, sinks), None, None


def _joined(sums: Sums, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums with the sinks in them, and the share that is left to the keys."""
    joined = torch.logaddexp(sums, sinks.detach().to(sums.dtype)[:, None])
    return joined, (sums - joined).exp()


def _gradient(grad_output: Tensor, out: Tensor, sums: Tensor, sinks: Tensor) -> Tensor:
    """The gradient of sinks [heads]; grad_output and out are [batch, heads, seq, head_dim]."""
    mass = (sinks.to(sums.dtype)[:, None] - sums).exp()
    aligned = (grad_output.to(sums.dtype) * out).sum(-1)
    return -(mass * aligned).sum((0, 2)).to(sinks.dtype)
