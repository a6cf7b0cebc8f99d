"""The gate of a layer's attention output: o times sigmoid(g), by head or by element (arXiv
2505.06708). g is one more output of the product that makes queries, keys and values."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def gated_output(
    out: Float[Tensor, "seq batch heads head_dim"], gate: Float[Tensor, "seq batch features"]
) -> Float[Tensor, "seq batch heads head_dim"]:
    """Return out * sigmoid(gate), where `gate` has one value a head or one for each element of the
    heads; the sigmoid is taken in fp32 or better."""
    by_head = gate.unflatten(-1, (out.shape[-2], -1))
    if torch.compiler.is_compiling():
        return out * _share(by_head)
    return _Gated.apply(out, by_head)


def _share(gate: Tensor) -> Tensor:
    exact = torch.promote_types(gate.dtype, torch.float32)
    return gate.to(exact).sigmoid().to(gate.dtype)


class _Gated(torch.autograd.Function):
    """Written out because autograd's version keeps the sigmoid in fp32 and in the output's dtype
    beside the two tensors that are there anyway."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(out, gate)
        return out * _share(gate)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        out, gate = ctx.saved_tensors
        share = _share(gate)
        sigmoid = torch.sigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32)))
        derivative = sigmoid * (1 - sigmoid)
        grad_share = grads[0] * out
        if gate.shape[-1] == 1 and out.shape[-1] > 1:
            grad_share = grad_share.sum(-1, keepdim=True, dtype=derivative.dtype)
        return grads[0] * share, (grad_share * derivative).to(gate.dtype)
