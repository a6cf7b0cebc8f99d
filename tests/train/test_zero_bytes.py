"""What each rank receives per step for ZeRO, counted at the process group: docs/scaling.md."""

from collections import Counter
from dataclasses import dataclass, replace

import pytest

from tests import distributed
from tests.parity.cases import model
from tests.parity.test_engine import LEARNING_RATE, Case, build

RANKS, MICRO_BATCHES = 4, 3
CASE = Case(model("rms-shared"), data=RANKS, accumulation=MICRO_BATCHES, precision="bf16")


@dataclass(frozen=True)
class Step:
    """Bytes of a step that one rank received, of all groups, and the parameters that ZeRO cuts."""

    parameters: int
    owned: int  # sums, each part for the rank that has it
    gathered: int
    summed: float  # sums that all are given

    def each(self) -> tuple[float, float, float]:
        """Bytes a parameter, owned, summed and gathered, over the share that comes from others."""
        share = self.parameters * (RANKS - 1) / RANKS
        return self.owned / share, self.summed / share, self.gathered / share


def steps_bytes(ranks: distributed.Ranks, cases: list[Case]) -> list[Step]:
    """The second step of each case."""
    from benchmarks.group_calls import counted
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
        with counted() as calls:
            built.train_step(batches, LEARNING_RATE)
        cut = sum(flat.numel() for flat in built.state.flats) * RANKS
        by_way = Counter[str]()
        for (_, way), size in calls.received.items():
            by_way[way] += size
        owned = by_way["all_to_all"] + by_way["reduce_scatter"]
        found.append(Step(cut, owned, by_way["all_gather"], calls.alike))
        built.close()
    return found


@pytest.fixture(scope="module")
def by_case() -> dict[str, list[Step]]:
    cases = {
        "1 bf16": CASE,
        "1 fp32": replace(CASE, precision="fp32"),
        "2 bf16": replace(CASE, zero_stage=2),
        "3 bf16": replace(CASE, zero_stage=3),
    }
    runs = distributed.run(RANKS, steps_bytes, list(cases.values()))
    return {name: [run[i] for run in runs] for i, name in enumerate(cases)}


SMALL = 0.01  # bytes a parameter, of norms, counts and losses


def test_parts_of_sums_go_to_their_owner_alone(by_case: dict[str, list[Step]]) -> None:
    """fp32 sums once a step, and new weights in bf16."""
    for step in by_case["1 bf16"]:
        owned, summed, gathered = step.each()
        assert (owned, gathered) == (4, 2)
        assert summed < SMALL


def test_what_deepspeed_itself_sends(by_case: dict[str, list[Step]]) -> None:
    for step in by_case["1 fp32"]:
        assert step.each() == (0, pytest.approx(2 * 4, abs=SMALL), 4)
    for step in by_case["2 bf16"]:
        assert step.each() == (0, pytest.approx(2 * 2 * MICRO_BATCHES, abs=SMALL), 2)
    for step in by_case["3 bf16"]:
        owned, summed, gathered = step.each()
        assert owned == 2 * MICRO_BATCHES
        assert summed < SMALL
        # A model this small is kept from a forward pass to its backward pass.
        assert gathered == pytest.approx(2 * MICRO_BATCHES, rel=0.02)
