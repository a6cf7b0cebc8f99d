"""The one way from queries, keys and values to attention output.

Every layer comes through these two functions: as written, as compiled pieces and regions, in the
self-test, with a cache of keys, and under the analysis of attention. Nothing else rotates queries
and keys, scales them, or calls a kernel.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from megahybrid.model.kernels import AttentionSpec, attend, halves
from megahybrid.model.kernels.sinks import gradient_of_sinks
from megahybrid.model.rotary import RotaryTable, rotate_both

Queries = Float[Tensor, "seq batch heads head_dim"]
Keys = Float[Tensor, "keys batch kv_heads head_dim"]


# `core_attention`, or what stands around it: a cache of keys, an observer.
CoreAttention = Callable[[Tensor, Tensor, Tensor, AttentionSpec, str], Tensor]


def prepare_queries_keys(
    q: Tensor, k: Tensor, table: RotaryTable | None, factor: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return q and k rotated by `table` and q times `factor`, the temperature of each query; the
    very same tensors where a scheme has neither.

    Everything is made already, because a compiled program sees tensors alone. The two leading axes
    are [seq, batch] or [batch, seq], the same for all; `factor` is [seq, batch, heads, 1] and may
    have one row, and one head, for all.
    """
    if table is not None:
        q, k = rotate_both(q, k, table)
    if factor is not None:
        q = q * factor.to(q.dtype)
    return q, k


def core_attention(q: Queries, k: Keys, v: Keys, spec: AttentionSpec, kernel: str) -> Queries:
    """Return the attention output of prepared heads, by the kernel of this name (or `auto`)."""
    return attend(q, k, v, spec, kernel)


def attention_forward(
    q: Queries, k: Keys, v: Keys, spec: AttentionSpec, kernel: str
) -> tuple[Queries, tuple[Tensor, ...]]:
    """Return `core_attention` without autograd, and what `attention_backward` needs of it beside
    the heads and the result: the keys and values need not be kept."""
    if (apart := halves(q, k, spec, kernel)) is not None:
        (forward, _), asked = apart
        return forward(q, k, v, asked)
    with torch.no_grad():
        return core_attention(q, k, v, spec, kernel), ()


def attention_backward(
    grad_output: Queries,
    q: Queries,
    k: Keys,
    v: Keys,
    out: Queries,
    kept: tuple[Tensor, ...],
    spec: AttentionSpec,
    kernel: str,
) -> tuple[Queries, Keys, Keys, Tensor | None]:
    """Return the gradients of q, k and v, and of the sinks of `spec` where it has some. Where a
    kernel has no backward of its own, its forward runs a second time."""
    if (apart := halves(q, k, spec, kernel)) is not None:
        (_, backward), asked = apart
        by_q, by_k, by_v = backward(grad_output, q, k, v, out, kept, asked)
        if spec.sinks is None:
            return by_q, by_k, by_v, None
        return by_q, by_k, by_v, gradient_of_sinks(grad_output, out, kept[0], spec.sinks)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    sinks = None if spec.sinks is None else spec.sinks.detach().requires_grad_()
    with torch.enable_grad():
        again = core_attention(q, k, v, replace(spec, sinks=sinks), kernel)
    leaves = (q, k, v) if sinks is None else (q, k, v, sinks)
    by_q, by_k, by_v, *by_sinks = torch.autograd.grad(again, leaves, grad_output)
    return by_q, by_k, by_v, by_sinks[0] if by_sinks else None
