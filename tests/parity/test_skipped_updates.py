"""A gradient that is not finite leaves weights and moments as they were, on every rank."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests import distributed
from tests.parity.cases import model
from tests.parity.test_engine import Case, build

CASES = {
    f"tensor{tensor}-data{2 // tensor}-zero{zero_stage}-{precision}": Case(
        model("rnope_swa"), tensor, 2 // tensor, zero_stage, precision=precision
    )
    for tensor, zero_stage, precision in (
        (1, 1, "bf16"),
        (1, 0, "fp32"),
        (2, 2, "fp32"),
        (2, 3, "bf16"),
        (1, 3, "fp32"),
    )
}


@dataclass
class Step:
    """What one rank saw of a step."""

    skipped: bool
    changed: list[str]  # tensors and states
    finite: bool
    optimizer_step: int


def three_steps(ranks: distributed.Ranks, cases: list[Case]) -> list[list[Step]]:
    """Each case's steps; in the second one data rank 0 alone has a loss that is no number."""
    return [_three_steps(ranks, case) for case in cases]


def _three_steps(ranks: distributed.Ranks, case: Case) -> list[Step]:
    from megahybrid.train.engine import Engine, MicroBatch, engine

    built = build(ranks, case, Engine, engine)
    forward = built.model.forward
    data_rank = ranks.mesh(case.tensor).data.rank

    def poisoned(*args: Any) -> Any:
        loss, per_token = forward(*args)
        return loss * float("nan"), per_token

    def state() -> dict[str, np.ndarray]:
        return {
            f"{each.tensor} {each.state} {each.box} {each.flat}": each.data.copy()
            for each in built.fragments()
        }

    steps, before = [], state()
    for index in range(3):
        batch = case.micro_batches(index)[data_rank]
        built.model.forward = poisoned if index == 1 and data_rank == 0 else forward
        result = built.train_step([MicroBatch(batch.tokens, batch.targets, batch.starts)], 1e-3)
        after = state()
        changed = [name for name in after if (before[name] != after[name]).any()]
        finite = all(np.isfinite(values).all() for values in after.values())
        steps.append(Step(result.skipped, changed, finite, built.optimizer_step))
        before = after
    built.close()
    return steps


@pytest.fixture(scope="module")
def seen() -> dict[str, list[list[Step]]]:
    """The steps of every rank, by case."""
    answers = distributed.run(2, three_steps, list(CASES.values()))
    return {name: [of_rank[i] for of_rank in answers] for i, name in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES)
def test_a_step_whose_gradient_is_no_number_changes_nothing(
    seen: dict[str, list[list[Step]]], case: str
) -> None:
    for first, second, third in seen[case]:
        assert not first.skipped
        assert second.skipped and second.changed == []
        assert not third.skipped
        assert all(step.finite for step in (first, second, third))
        assert [step.optimizer_step for step in (first, second, third)] == [1, 1, 2]
    for place in (0, 2):
        assert any(of_rank[place].changed for of_rank in seen[case])
