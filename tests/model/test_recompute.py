"""Selective recompute: what is said to be dropped is gone, and the gradients are the same."""

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megahybrid.model.recompute import rederived
from megahybrid.parallel.products import linear


class Sine(torch.autograd.Function):
    """Keeps its input only, so that nothing but a reader keeps its output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize("reader", [F.linear, linear], ids=["torch", "ours"])
def test_a_rederived_tensor_does_not_outlive_its_forward(reader: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(4096, 1, 64, requires_grad=True)
    weight = torch.randn(48, 64, requires_grad=True)
    kept = torch.autograd.grad(reader(Sine.apply(x), weight).square().sum(), (x, weight))

    dropped = Sine.apply(x)
    alive = weakref.ref(dropped)
    with rederived(dropped, torch.sin, x.detach()):
        y = reader(dropped, weight)
    del dropped
    gc.collect()
    assert alive() is None
    for ours, plain in zip(torch.autograd.grad(y.square().sum(), (x, weight)), kept, strict=True):
        assert torch.equal(ours, plain)


def test_only_the_tensor_itself_is_rederived() -> None:
    x = torch.randn(32, 1, 16, requires_grad=True)
    other, weight = torch.randn(32, 1, 16), torch.randn(8, 16, requires_grad=True)
    normed = x.sin()
    with rederived(normed, lambda source: torch.full_like(source, torch.nan), x.detach()):
        y = F.linear(other, weight)
    (grad,) = torch.autograd.grad(y.sum(), weight)
    assert grad.isfinite().all()
