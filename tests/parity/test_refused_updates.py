"""A step that is refused changes nothing; a weight whose bits differ between data ranks is seen."""

from typing import Any

import numpy as np
import pytest

from megahybrid.config.training import SpikeConfig
from megahybrid.errors import AuditError
from megahybrid.train.spikes import judge_spike, remember
from tests import distributed
from tests.parity.cases import model
from tests.parity.test_engine import Case, build

CASES = {
    f"tensor{tensor}-data{2 // tensor}-zero{zero_stage}-{precision}": Case(
        model("rnope_swa"), tensor, 2 // tensor, zero_stage, precision=precision
    )
    for tensor, zero_stage, precision in (
        (1, 0, "fp32"),
        (1, 1, "bf16"),
        (2, 2, "fp32"),
        (1, 3, "fp32"),
    )
}


def _engine(ranks: distributed.Ranks, case: Case) -> tuple[Any, Any]:
    from megahybrid.train.engine import Engine, MicroBatch, engine

    built = build(ranks, case, Engine, engine)
    data_rank = ranks.mesh(case.tensor).data.rank

    def step(index: int, **options: Any) -> Any:
        batch = case.micro_batches(index)[data_rank]
        micro_batch = MicroBatch(batch.tokens, batch.targets, batch.starts)
        return built.train_step([micro_batch], 1e-3, **options)

    return built, step


def refused_step(ranks: distributed.Ranks, cases: list[Case]) -> list[tuple[Any, ...]]:
    """Of each case: what was told and changed in a refused step between two that were not."""
    answers = []
    for case in cases:
        built, step = _engine(ranks, case)

        def state(built: Any = built) -> list[np.ndarray]:
            return [each.data.copy() for each in built.fragments()]

        told: list[tuple[float, float]] = []
        first = step(0)
        before = state()
        second = step(1, gate=lambda *seen: told.append(seen) or "on purpose")  # noqa: B023
        same = all((a == b).all() for a, b in zip(before, state(), strict=True))
        third = step(2, gate=lambda *_: None)
        moved = any((a != b).any() for a, b in zip(before, state(), strict=True))
        results = [(one.skipped, one.refused) for one in (first, second, third)]
        judged = (second.loss, second.gradient_norm) == told[0] and len(told) == 1
        answers.append((results, same, moved, judged, built.optimizer_step))
        built.close()
    return answers


def test_a_refused_step_changes_nothing_at_any_zero_stage() -> None:
    by_rank = distributed.run(2, refused_step, list(CASES.values()))
    for of_rank in by_rank:
        for results, same, _, judged, optimizer_step in of_rank:
            assert results == [(False, None), (True, "on purpose"), (False, None)]
            assert same and judged
            assert optimizer_step == 2
    # A rank may hold nothing that a checkpoint takes.
    assert all(any(moved for _, _, moved, *_ in ranks) for ranks in zip(*by_rank, strict=True))


def flipped_bit(ranks: distributed.Ranks, cases: list[Case]) -> list[str]:
    """Of each case: what the audited step says after data rank 1 lost a bit of one weight."""
    import torch

    answers = []
    for case in cases:
        built, step = _engine(ranks, case)
        step(0, audit=True)
        if ranks.mesh(case.tensor).data.rank == 1:
            with torch.no_grad():
                parameter = next(p for p in built.model.parameters() if p.ndim == 2)
                bits = parameter.view(-1).view(
                    {2: torch.int16, 4: torch.int32}[parameter.element_size()]
                )
                bits[5] ^= 1
        try:
            step(1, audit=True)
            answers.append("")
        except AuditError as error:
            answers.append(str(error))
        built.close()
    return answers


def test_one_wrong_bit_on_one_data_rank_stops_all_of_them() -> None:
    cases = [case for case in CASES.values() if case.data > 1 and case.zero_stage < 3]
    assert len(cases) == 2
    for of_rank in distributed.run(2, flipped_bit, cases):
        for message in of_rank:
            assert message.startswith("audit: the weight embedding.weight is not the same bits")
            assert "ranks 0, 1 differ" in message


def odd_copy(ranks: distributed.Ranks, odd: int, tensor: int) -> str:
    """What the audit says of one copy of a replicated weight that is another."""
    import torch

    from megahybrid.train.engine.audit import _far_from_most, ranks_in_words

    mesh = ranks.mesh(tensor)
    value = torch.linspace(-1, 1, 7)
    if mesh.tensor.rank == odd:
        value[3] += 1e-3
    return ranks_in_words(_far_from_most(value, mesh), mesh.tensor)


def test_of_several_tensor_ranks_the_one_that_differs_is_named() -> None:
    assert distributed.run(4, odd_copy, 2, 4) == ["rank 2 differs from the others"] * 4
    # With two nobody can say which of them is right: world ranks, by tensor group.
    said = distributed.run(4, odd_copy, 1, 2)
    assert said == ["ranks 0, 1 differ"] * 2 + ["ranks 2, 3 differ"] * 2


def test_a_spike_is_six_deviations_above_the_last_steps() -> None:
    rule, recent = SpikeConfig(), ()
    for index in range(300):
        loss, norm = 2.0 + 0.1 * (index % 2), 1.0
        assert judge_spike(rule, recent, loss, norm) is None
        recent = remember(rule, recent, loss, norm)
    assert len(recent) == 128
    assert judge_spike(rule, recent, 2.05 + 0.299, 1.0) is None
    message = judge_spike(rule, recent, 2.05 + 0.301, 1.0)
    assert message == (
        "spike: loss 2.351 is 6.0 deviations above the mean 2.05 of the last 128 steps"
    )
    assert "gradient norm 1e+04" in (judge_spike(rule, recent, 2.05, 1e4) or "")
    # Below the mean nothing is wrong, and before half of the steps nothing is known.
    assert judge_spike(rule, recent, 0.0, 0.0) is None
    assert judge_spike(rule, recent[:63], 9.0, 9.0) is None


@pytest.mark.parametrize("steps", [1, 3])
def test_too_few_steps_to_judge_by_are_refused(steps: int) -> None:
    with pytest.raises(ValueError):
        SpikeConfig(over_steps=steps)
