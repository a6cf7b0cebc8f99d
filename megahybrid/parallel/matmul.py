"""Matrix products in fp32 on a CPU, by the faster of two exact routines.

torch sends them to MKL, which keeps to AVX2 on processors that are not Intel's. oneDNN, which torch
brings along for its own convolutions and compiled code, computes the same products with AVX-512:
twice as fast on AMD processors that have it, a tenth slower on Intel's (docs/performance.md). Which
of the two large products take is one setting of the process, as its number of threads is: `use`.
Everything else (float64, bf16, accelerators, small products) is torch's own.
"""

from contextlib import suppress
from functools import cache
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

ROUTINES = ("torch", "onednn")
# Multiply-adds, and sizes of the factors, below which oneDNN's call costs more than it gains.
SMALLEST = 2**20
NARROWEST = 16
# Whether this torch has the routine; known at import, because torch.compile does not trace the
# question.
ONEDNN_SERVES = (
    hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
)


@cache
def usual_routine() -> str:
    """Return the routine of a run that does not measure: oneDNN where only it uses AVX-512."""
    has_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return "onednn" if ONEDNN_SERVES and has_avx512 and not _is_intel() else "torch"


@cache
def processor() -> dict[str, str]:
    """Return what Linux says of the first core ("vendor_id", "model name", …); empty elsewhere."""
    facts: dict[str, str] = {}
    with suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in takewhile(str.strip, lines):  # a blank line ends what is said of a core
            name, _, value = line.partition(":")
            facts[name.strip()] = value.strip()
    return facts


def _is_intel() -> bool:
    return processor().get("vendor_id") == "GenuineIntel"


def use(routine: str) -> None:
    """Have this process's large products go to `routine` from now on.

    Takes torch's own where a checkpoint names oneDNN and this torch has none.
    """
    global _in_use
    assert routine in ROUTINES
    _in_use = routine if ONEDNN_SERVES else "torch"


def in_use() -> str:
    """Return the routine that large products go to."""
    return _in_use


_in_use = usual_routine()


def linear(
    x: Float[Tensor, "*rows in_features"], weight: Float[Tensor, "out_features in_features"]
) -> Float[Tensor, "*rows out_features"]:
    """x weightᵀ in x's dtype, differentiable."""
    weight = weight.to(x.dtype)
    if torch.compiler.is_compiling():
        return F.linear(
            x, weight
        )  # the compiler has its own ways, and none into oneDNN's private one
    if prefers_onednn(x, weight.t()):
        return _Linear.apply(x, weight)
    return F.linear(x, weight)


def product(
    left: Float[Tensor, "*rows inner"],
    right: Float[Tensor, "inner columns"],
    out: Float[Tensor, "*rows columns"] | None = None,
) -> Float[Tensor, "*rows columns"]:
    """left @ right without gradients; both may be transposed views."""
    if not prefers_onednn(left, right):
        return torch.matmul(left, right, out=out)
    # The first factor is copied unless contiguous, so the smaller one goes first.
    copied = 0 if left.is_contiguous() else left.numel()
    copied_swapped = right.numel() + left.shape[0] * right.shape[1]
    if left.dim() == 2 and left.stride(0) == 1 and copied > copied_swapped:
        result = _onednn(right.t(), left).t()
    else:
        result = _onednn(left, right.t())
    return result.contiguous() if out is None else out.copy_(result)


def product_exact(left: Tensor, right: Tensor, exact: torch.dtype) -> Tensor:
    """left @ right as `exact`; on CUDA the product itself is, elsewhere it is converted."""
    if left.dtype != exact and left.is_cuda:
        return torch.mm(left, right, out_dtype=exact)
    return product(left, right).to(exact)


def accumulate(
    total: Float[Tensor, "rows columns"],
    left: Float[Tensor, "inner rows"],
    right: Float[Tensor, "inner columns"],
) -> None:
    """total += leftᵀ right, with the sum in total's dtype."""
    if left.dtype == total.dtype and not prefers_onednn(left.t(), right):
        total.addmm_(left.t(), right)
    elif left.is_cuda and _adds_to_fp32(left.device, left.dtype):
        torch.addmm(total, left.t(), right, out_dtype=total.dtype, out=total)
    else:
        # By rows: a product of a large weight's size would stand beside its gradient.
        rows = max(8192, 2**24 // total.shape[1])
        for start in range(0, total.shape[0], rows):
            piece = slice(start, start + rows)
            total[piece] += product_exact(left[:, piece].t(), right, total.dtype)


@cache
def _adds_to_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether this torch's addmm takes an fp32 addend to low-precision factors.

    2.10 does not.
    """
    factor, addend = torch.ones(8, 8, device=device, dtype=dtype), torch.ones(8, 8, device=device)
    try:
        torch.addmm(addend, factor, factor, out_dtype=torch.float32, out=addend)
    except (RuntimeError, TypeError):
        return False
    return bool((addend == 9).all())


class _Linear(torch.autograd.Function):
    """Keeps what F.linear keeps: its two inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        grad = grads[0]
        grad_x = product(grad, weight) if needs_x else None
        grad_weight = None
        if needs_weight:
            rows = grad.reshape(-1, grad.shape[-1])
            grad_weight = product(rows.t(), x.reshape(-1, x.shape[-1]))
        return grad_x, grad_weight


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    """x weightᵀ; the one place that knows torch's private name for it."""
    # For a view with gaps oneDNN falls back to a loop that is 300 times slower.
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.t().contiguous().t() if weight.stride(0) == 1 else weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, None, "none", [], "")


def prefers_onednn(left: Tensor, right: Tensor) -> bool:
    """Return whether left @ right goes to oneDNN."""
    if left.dtype != torch.float32 or left.device.type != "cpu" or left.numel() == 0:
        return False
    inner, columns = right.shape
    rows = left.numel() // inner
    large = rows * inner * columns >= SMALLEST and min(rows, inner, columns) >= NARROWEST
    return large and _in_use == "onednn"
