"""silu(gate) * up (arXiv 2002.05202): alone, as one operation with its gradient, and for an MLP
that runs in chunks. `geglu` has the same for GELU."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up. Keeps its two inputs only; autograd's own product keeps silu(gate) too."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        # autograd's own kernel for d silu: five passes over memory less than written out.
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, F.silu(gate).mul_(grad)


def swiglu(
    gate: Float[Tensor, "seq batch features_local"], up: Float[Tensor, "seq batch features_local"]
) -> Float[Tensor, "seq batch features_local"]:
    """silu(gate) * up, element by element."""
    if torch.compiler.is_compiling():
        return F.silu(gate) * up  # the compiler keeps the two inputs and makes one kernel of it
    return _SwiGLU.apply(gate, up)


def silu_gated(
    gate: Float[Tensor, "tokens inner"], up: Float[Tensor, "tokens inner"]
) -> Float[Tensor, "tokens inner"]:
    """silu(gate) * up, without a gradient."""
    return F.silu(gate).mul_(up)


def silu_gated_gradients(
    gate: Float[Tensor, "tokens inner"],
    up: Float[Tensor, "tokens inner"],
    grad: Float[Tensor, "tokens inner"],
) -> Float[Tensor, "tokens inner"]:
    """Return silu(gate) * up; its gradient `grad` becomes those of gate and up, which take their
    place, and is spent. Compiled, it is one kernel: three tensors in, three out."""
    active = F.silu(gate)
    made = active * up
    grad_up = active.mul_(grad)
    # A compiler that sees `grad` change would write it out for nothing.
    grad_active = grad * up if torch.compiler.is_compiling() else grad.mul_(up)
    torch.ops.aten.silu_backward.grad_input(grad_active, gate, grad_input=gate)
    up.copy_(grad_up)
    return made
