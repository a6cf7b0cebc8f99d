"""gelu(gate) * up, GELU by its tanh formula (arXiv 1606.08415, 2002.05202): alone, as one operation
with its gradient, and for an MLP that runs in chunks. `swiglu` has the same for SiLU."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

TANH = "tanh"


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate=TANH)


class _GeGLU(torch.autograd.Function):
    """gelu(gate) * up. Keeps its two inputs only."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gelu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.gelu_backward(grad * up, gate, approximate=TANH)
        return grad_gate, _gelu(gate).mul_(grad)


def geglu(
    gate: Float[Tensor, "seq batch features_local"], up: Float[Tensor, "seq batch features_local"]
) -> Float[Tensor, "seq batch features_local"]:
    """gelu(gate) * up, element by element."""
    if torch.compiler.is_compiling():
        return _gelu(gate) * up  # the compiler keeps the two inputs and makes one kernel of it
    return _GeGLU.apply(gate, up)


def gelu_gated(
    gate: Float[Tensor, "tokens inner"], up: Float[Tensor, "tokens inner"]
) -> Float[Tensor, "tokens inner"]:
    """gelu(gate) * up, without a gradient."""
    return _gelu(gate).mul_(up)


def gelu_gated_gradients(
    gate: Float[Tensor, "tokens inner"],
    up: Float[Tensor, "tokens inner"],
    grad: Float[Tensor, "tokens inner"],
) -> Float[Tensor, "tokens inner"]:
    """Return gelu(gate) * up; its gradient `grad` becomes those of gate and up, which take their
    place, and is spent. Compiled, it is one kernel: three tensors in, three out."""
    active = _gelu(gate)
    made = active * up
    grad_up = active.mul_(grad)
    # A compiler that sees `grad` change would write it out for nothing.
    grad_active = grad * up if torch.compiler.is_compiling() else grad.mul_(up)
    torch.ops.aten.gelu_backward.grad_input(grad_active, gate, approximate=TANH, grad_input=gate)
    up.copy_(grad_up)
    return made
