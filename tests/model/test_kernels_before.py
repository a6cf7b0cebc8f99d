"""Attention of the last tokens of a row to all of its keys: every kernel that serves it gives the
rows that it would give for the whole."""

import pytest
import torch
from torch import Tensor

from megahybrid.model.kernels import AttentionSpec, attend
from megahybrid.model.kernels.documents import Documents
from tests.parallel.compare import EXACT


def drawn(keys: int, rows: int, heads: int, kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and a gradient of the output, for every token."""
    generator = torch.Generator().manual_seed(keys + rows)
    return [
        torch.randn(keys, rows, n, 16, generator=generator, dtype=torch.float64).to(dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    ]


def of_the_last(
    inputs: list[Tensor], queries: int, kernel: str, how: dict[str, object], whole: bool = False
) -> list[Tensor]:
    """The output of the last queries, and the gradients of these and of every key and value: by a
    call of all tokens, if `whole`, or of the last queries alone."""
    q, k, v, grad = (x.clone() for x in inputs)
    before = len(k) - queries
    last = q[before:].requires_grad_()
    k, v = k.requires_grad_(), v.requires_grad_()
    if whole:
        out = attend(torch.cat((q[:before], last)), k, v, AttentionSpec(scale=0.3, **how), kernel)  # type: ignore[arg-type]
        out = out[before:]
    else:
        spec = AttentionSpec(scale=0.3, before=before, **how)  # type: ignore[arg-type]
        out = attend(last, k, v, spec, kernel)
    return [out.detach(), *torch.autograd.grad(out, (last, k, v), grad[before:])]


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("before", [0, 1, 13])
def test_reference_gives_the_last_rows_of_the_whole(before: int, window: int | None) -> None:
    inputs = drawn(20, 2, 4, 2, torch.float64)
    for lengths in (None, [[before + 1, 19 - before], [7, 13]]):
        documents = lengths and Documents.from_lengths(lengths)
        how: dict[str, object] = {"window": window, "documents": documents}
        found = of_the_last(inputs, 20 - before, "reference", how)
        for ours, right in zip(
            found, of_the_last(inputs, 20 - before, "reference", how, whole=True), strict=True
        ):
            assert (ours - right).norm() <= EXACT * right.norm().clamp(min=1)
