"""Our products against torch's own in float64; gradients too, and what never leaves torch."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from megahybrid.parallel import matmul
from megahybrid.parallel.matmul import ONEDNN_SERVES, linear, prefers_onednn, product

needs_onednn = pytest.mark.skipif(
    not ONEDNN_SERVES, reason="a torch without oneDNN: torch's own products serve"
)
SHAPES = [(5, 3, 8, 4), (64, 2, 96, 128), (257, 1, 384, 200), (1, 1, 700, 2000)]
BOUND = 2e-6


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture(autouse=True, params=matmul.ROUTINES)
def every_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products of any size go to each routine, also where it is not the processor's usual one."""
    monkeypatch.setattr(matmul, "SMALLEST", 0)
    monkeypatch.setattr(matmul, "NARROWEST", 1)
    matmul.use(request.param)
    yield
    matmul.use(matmul.usual_routine())


@pytest.mark.parametrize("seq, batch, inner, outer", SHAPES)
def test_linear_and_both_gradients_equal_float64(
    seq: int, batch: int, inner: int, outer: int
) -> None:
    torch.manual_seed(0)
    # A slice of something wider, as the products of a fused projection are.
    x = torch.randn(seq, batch, inner + 7)[..., 3 : 3 + inner].requires_grad_()
    weight = torch.randn(outer, inner, requires_grad=True)
    grad = torch.randn(seq, batch, outer)
    ours = linear(x, weight)
    grads = torch.autograd.grad(ours, (x, weight), grad)

    exact_x, exact_weight = x.detach().double(), weight.detach().double()
    exact_x.requires_grad_(), exact_weight.requires_grad_()
    exact = F.linear(exact_x, exact_weight)
    exact_grads = torch.autograd.grad(exact, (exact_x, exact_weight), grad.double())

    assert relative_error(ours, exact) < BOUND
    for mine, theirs in zip(grads, exact_grads, strict=True):
        assert mine.shape == theirs.shape
        assert relative_error(mine, theirs) < BOUND


def test_products_take_transposed_factors_and_write_where_told() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(384, 150), torch.randn(384, 96)
    out = torch.empty(200, 96)[25:175]
    exact = left.double().t() @ right.double()
    returned = product(left.t(), right, out=out)
    assert relative_error(out, exact) < BOUND
    assert returned.data_ptr() == out.data_ptr()
    assert relative_error(product(left.t(), right), exact) < BOUND
    assert relative_error(product(left[:, 20:].t(), right), exact[20:]) < BOUND
    assert relative_error(product(left.t(), right[:, 9:]), exact[:, 9:]) < BOUND
    assert (
        relative_error(
            product(left[::2].t(), right[::2]), left[::2].double().t() @ right[::2].double()
        )
        < BOUND
    )


@needs_onednn
def test_only_fp32_on_a_cpu_and_large_enough_leaves_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    square = torch.ones(4, 4)
    if matmul.in_use() == "torch":
        assert not prefers_onednn(square, square)
        return
    assert prefers_onednn(square, square)
    assert not prefers_onednn(square.double(), square.double())
    assert not prefers_onednn(square.bfloat16(), square.bfloat16())
    assert not prefers_onednn(square.to("meta"), square.to("meta"))
    monkeypatch.setattr(matmul, "SMALLEST", 65)
    assert not prefers_onednn(square, square)
    monkeypatch.setattr(matmul, "SMALLEST", 64)
    monkeypatch.setattr(matmul, "NARROWEST", 5)
    assert not prefers_onednn(square, square)


@needs_onednn
def test_a_product_repeats_its_bits_wherever_its_factors_lie() -> None:
    left, weight = torch.randn(100, 384), torch.randn(300, 384)
    first = linear(left, weight)
    storage = torch.empty(100 * 384 + 64)
    for offset in range(1, 40, 3):
        moved = storage[offset : offset + left.numel()].view_as(left).copy_(left)
        assert torch.equal(linear(moved, weight), first), offset
