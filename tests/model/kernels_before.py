"""Queries that are the last tokens of a row: rows, inputs, and calls of a kernel with them and with
all queries."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megahybrid.model.kernels import AttentionSpec, attend
from megahybrid.model.kernels.documents import Documents
from tests.parallel.compare import EXACT

KEYS, QUERIES = 300, 60  # blocks are of 64 tokens
BEFORE = KEYS - QUERIES
# Documents of two rows that end one before, at, one behind the first query; of one token; over all.
ROWS: dict[str, list[list[int]] | None] = {
    "one-document": None,
    "ends-before": [[BEFORE - 1, QUERIES + 1], [BEFORE - 1, 1, 1, QUERIES - 1]],
    "ends-at": [[BEFORE, QUERIES], [150, BEFORE - 150, 1, QUERIES - 1]],
    "ends-behind": [[BEFORE + 1, QUERIES - 1], [KEYS]],
    "single-tokens": [[1] * KEYS, [BEFORE - 2, *[1] * (QUERIES + 2)]],
    "many": [[100, 120, 50, 25, 5], [5, 270, 24, 1]],
}
WINDOWS = [1, 2, QUERIES, QUERIES + 1, QUERIES + 2, 3 * QUERIES + 1]  # of so many keys, its own too
HEADS = [(4, 2), (3, 3), (4, 1)]


def documents_of(rows: str) -> Documents | None:
    lengths = ROWS[rows]
    return None if lengths is None else Documents.from_lengths(lengths)


def drawn(
    heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = torch.float64,
    keys: int = KEYS,
    rows: int = 2,
) -> list[Tensor]:
    """q, k, v and a gradient of the output, for every token."""
    generator = torch.Generator().manual_seed(keys + rows)
    counts = (heads[0], heads[1], heads[1], heads[0])
    return [
        torch.randn(keys, rows, n, 16, generator=generator, dtype=torch.float64).to(dtype)
        for n in counts
    ]


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def results(inputs: list[Tensor], call: Attend, queries: int = QUERIES) -> list[Tensor]:
    """The output of the last queries, and the gradients of these and of every key and value."""
    q, k, v, grad = (x.detach().clone() for x in inputs)
    q, grad = q[-queries:], grad[-queries:]
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def last(kernel: str, **how: Any) -> Attend:
    """A call of a kernel with the last queries and all keys."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        spec = AttentionSpec(scale=0.3, before=len(k) - len(q), **how)
        return attend(q, k, v, spec, kernel)

    return call


def whole(**how: Any) -> Attend:
    """The reference for as many queries as keys; those before the last are of no matter."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        before = len(k) - len(q)
        every = torch.cat((q.new_ones(before, *q.shape[1:]), q))
        return attend(every, k, v, AttentionSpec(scale=0.3, **how), "reference")[before:]

    return call


def assert_same(found: list[Tensor], right: list[Tensor], bound: float = EXACT) -> None:
    for ours, expected in zip(found, right, strict=True):
        assert ours.shape == expected.shape and ours.isfinite().all()
        assert (ours - expected).norm() <= bound * expected.norm().clamp(min=1)
