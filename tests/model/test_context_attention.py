"""Attention over context ranks is attention of whole rows: one layer, float64, every gradient."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from megahybrid.config.context import Exchange, Layout
from megahybrid.model.context_attention import ShardedCall, attend_sharded
from megahybrid.model.core_attention import core_attention
from megahybrid.model.kernels import AttentionSpec, Documents
from megahybrid.model.row_shards import RowShards
from megahybrid.parallel.collectives import all_reduce
from megahybrid.parallel.mesh import Axis
from tests import distributed
from tests.parallel.compare import draw, error

BOUND = 1e-10
SIZE = 6  # tokens of a segment
HEADS = {"heads": (4, 4, 3), "shared": (4, 1, 3), "groups": (8, 2, 3)}
Case = tuple[Layout, Exchange, int | None, str, bool, bool]


def documents(edges: list[int], length: int) -> list[list[int]]:
    """Rows with documents that end one token before, at and one after an edge of a shard, that are
    of one token on both sides of it, and that go on over three shards."""
    about = [[edge + off for edge in edges] for off in (-1, 0, 1)]
    about.append([edge + off for edge in edges for off in (-1, 0, 1)])
    about.append([edges[0] - 2, edges[-1] + 2])
    return [[stop - start for start, stop in pairwise([0, *row, length])] for row in about]


def cases(degree: int) -> Iterator[Case]:
    """Every exchange and layout, windows about the length of what a rank holds, all heads."""
    held = {"contiguous": SIZE, "zigzag": 2 * SIZE}
    number = 0
    for layout in ("contiguous", "zigzag"):
        own = held[layout]
        for reach in (0, 1, own - 1, own, own + 1, 3 * own, None):
            for exchange in ("halo", "heads", "keys"):
                if exchange == "halo" and reach is None:
                    continue
                number += 1
                heads = list(HEADS)[number % 3]
                window = None if reach is None else reach + 1
                sinks = number % 5 < 2
                yield layout, exchange, window, heads, number % 4 != 0, sinks  # type: ignore[misc]


def case_errors(axis: Axis, case: Case, kernel: str) -> dict[str, float]:
    """The output, and the gradients of queries, keys and values, of this rank's tokens; where there
    are sinks, their gradient of all ranks together."""
    layout, exchange, window, heads, several, sunk = case
    count = axis.size * (1 if layout == "contiguous" else 2)
    length = SIZE * count
    edges = [SIZE * number for number in range(1, count)]
    docs = Documents.from_lengths(documents(edges, length)) if several else None
    h, g, dim = HEADS[heads]
    rows = len(documents(edges, length))
    whole = [draw(name, length, rows, n, dim) for name, n in (("q", h), ("k", g), ("v", g))]
    grad_output = draw("grad", length, rows, h, dim)
    spec = AttentionSpec(window=window, documents=docs, scale=0.6)

    leaves = [x.clone().requires_grad_() for x in whole]
    sinks = [draw("sinks", h).requires_grad_()] if sunk else []
    spec = replace(spec, sinks=sinks[0]) if sunk else spec
    out = core_attention(*leaves, spec, "reference")
    by_q, by_k, by_v, *by_sinks = torch.autograd.grad((out * grad_output).sum(), leaves + sinks)
    right = [out, by_q, by_k, by_v]

    shards = RowShards(axis, layout, length, ((window, exchange),))
    mine = [shards.cut(x, 0).clone().requires_grad_() for x in whole]
    ours = attend_sharded(*mine, ShardedCall(shards, spec, kernel))
    summed = (ours * shards.cut(grad_output, 0)).sum()
    mine_q, mine_k, mine_v, *mine_sinks = torch.autograd.grad(summed, mine + sinks)
    got = [ours, mine_q, mine_k, mine_v]
    with torch.no_grad():
        again = attend_sharded(*mine, ShardedCall(shards, spec, kernel))
    names = ("output", "queries", "keys", "values", "output without gradients")
    errors = {
        name: _apart(one, shards.cut(other, 0))
        for name, one, other in zip(names, [*got, again], [*right, out], strict=True)
    }
    for one, other in zip(mine_sinks, by_sinks, strict=True):
        errors["sinks"] = _apart(all_reduce(one, axis), other)
    return errors


def _apart(found: Tensor, expected: Tensor) -> float:
    """Relative; of what is 0 all over (a window of one key) absolute."""
    return error(found, expected) if expected.abs().max() > 1e-12 else float(found.abs().max())


def all_errors(ranks: distributed.Ranks) -> dict[str, float]:
    """Every case on this rank."""
    axis, found = ranks.mesh(1, ranks.world_size).context, {}
    for number, case in enumerate(cases(axis.size)):
        kernel = ("reference", "auto")[number % 2]
        words = "-".join(map(str, (*case, kernel)))
        found |= {f"{words}: {what}": e for what, e in case_errors(axis, case, kernel).items()}
    return found


@pytest.mark.parametrize("degree", [2, 4])
def test_every_exchange_computes_attention_of_whole_rows(degree: int) -> None:
    results: list[dict[str, Any]] = distributed.run(degree, all_errors)
    assert len(results[0]) == 5 * 40 + 16  # sinks
    for errors in results:
        assert {name: worst for name, worst in errors.items() if not worst <= BOUND} == {}
