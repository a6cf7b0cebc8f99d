"""What each rank receives per step for ZeRO, counted at the process group: docs/scaling.md."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from tests import distributed
from tests.parity.cases import model
from tests.parity.test_engine import LEARNING_RATE, Case, build

RANKS, MICRO_BATCHES = 4, 3
CASE = Case(model("rms-shared"), data=RANKS, accumulation=MICRO_BATCHES, precision="bf16")
# A method of a process group, and the bytes that a rank receives at least when each sends what is
# for others once, as multiples of its arguments': (output, input).
RECEIVED: dict[str, Callable[[int, int, int], float]] = {
    "alltoall_base": lambda output, _, ranks: output * (ranks - 1) / ranks,
    "all_to_all_single": lambda output, _, ranks: output * (ranks - 1) / ranks,
    "_allgather_base": lambda output, own, _: output - own,
    "all_gather_single": lambda output, own, _: output - own,
    "_reduce_scatter_base": lambda output, whole, _: whole - output,
    "reduce_scatter_single": lambda output, whole, _: whole - output,
}
# These take lists of tensors, or one.
ONE_SIDED: dict[str, Callable[[int, int], float]] = {
    "allreduce": lambda size, ranks: 2 * size * (ranks - 1) / ranks,
    "reduce": lambda size, ranks: size,
    "broadcast": lambda size, ranks: size,
}


def size_of(tensors: Any) -> int:
    each = tensors if isinstance(tensors, list | tuple) else [tensors]
    return sum(tensor.nbytes for tensor in each)


@contextmanager
def received() -> Iterator[Counter[str]]:
    """Bytes by method of all groups of this process."""
    found: Counter[str] = Counter()

    def watch(name: str, size: Callable[..., float]) -> Callable[..., Any]:
        method = getattr(dist.ProcessGroup, name)

        def call(group: Any, *args: Any, **options: Any) -> Any:
            found[name] += round(size(group.size(), *args))
            return method(group, *args, **options)

        return call

    with ExitStack() as stack:
        for name, two in RECEIVED.items():
            if hasattr(dist.ProcessGroup, name):
                new = watch(name, lambda n, out, own, *_, two=two: two(out.nbytes, own.nbytes, n))
                stack.enter_context(mock.patch.object(dist.ProcessGroup, name, new))
        for name, one in ONE_SIDED.items():
            new = watch(name, lambda n, all_of, *_, one=one: one(size_of(all_of), n))
            stack.enter_context(mock.patch.object(dist.ProcessGroup, name, new))
        yield found


def steps_bytes(ranks: distributed.Ranks, cases: list[Case]) -> list[tuple[int, Counter[str]]]:
    """By case the parameters as ZeRO cuts them, and the bytes of the second step."""
    from megahybrid.train.engine import Engine, MicroBatch, engine

    found = []
    for case in cases:
        built = build(ranks, case, Engine, engine)
        first = ranks.rank * case.accumulation
        batches = [
            MicroBatch(each.tokens, each.targets, each.starts)
            for each in case.micro_batches(0)[first : first + case.accumulation]
        ]
        built.train_step(batches, LEARNING_RATE)
        with received() as calls:
            built.train_step(batches, LEARNING_RATE)
        cut = sum(flat.numel() for flat in built.state.flats) * RANKS
        found.append((cut, calls))
        built.close()
    return found


@pytest.fixture(scope="module")
def by_case() -> dict[str, list[tuple[int, Counter[str]]]]:
    cases = {
        "1 bf16": CASE,
        "1 fp32": replace(CASE, precision="fp32"),
        "2 bf16": replace(CASE, zero_stage=2),
        "3 bf16": replace(CASE, zero_stage=3),
    }
    runs = distributed.run(RANKS, steps_bytes, list(cases.values()))
    return {name: [run[i] for run in runs] for i, name in enumerate(cases)}


SMALL = 0.01  # bytes a parameter, of norms, counts and losses


def by_way(calls: Counter[str], cut: int) -> tuple[float, float, float]:
    """Bytes a parameter that were summed to their owners, summed to all, and gathered; over the
    share that comes from others."""
    owners = ("alltoall_base", "all_to_all_single", "_reduce_scatter_base", "reduce_scatter_single")
    everyone = ("allreduce", "reduce", "broadcast")
    gathers = ("_allgather_base", "all_gather_single")
    assert not set(calls) - {*owners, *everyone, *gathers}
    share = cut * (RANKS - 1) / RANKS
    owned, summed, gathered = (
        sum(calls[name] for name in names) / share for names in (owners, everyone, gathers)
    )
    return owned, summed, gathered


def test_parts_of_sums_go_to_their_owner_alone(by_case: Any) -> None:
    """fp32 sums once a step, and new weights in bf16."""
    for cut, calls in by_case["1 bf16"]:
        owned, summed, gathered = by_way(calls, cut)
        assert (owned, gathered) == (4, 2)
        assert summed < SMALL


def test_what_deepspeed_itself_sends(by_case: Any) -> None:
    for cut, calls in by_case["1 fp32"]:
        assert by_way(calls, cut) == (0, pytest.approx(2 * 4, abs=SMALL), 4)
    for cut, calls in by_case["2 bf16"]:
        assert by_way(calls, cut) == (0, pytest.approx(2 * 2 * MICRO_BATCHES, abs=SMALL), 2)
    for cut, calls in by_case["3 bf16"]:
        owned, summed, gathered = by_way(calls, cut)
        assert owned == 2 * MICRO_BATCHES
        assert summed < SMALL
        # A model this small is kept from a forward pass to its backward pass.
        assert gathered == pytest.approx(2 * MICRO_BATCHES, rel=0.02)
