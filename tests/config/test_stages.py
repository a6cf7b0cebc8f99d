"""Which step comes after which tokens: a pure function, held to plain stepping."""

import itertools
import math
import time
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megahybrid.config import parse
from megahybrid.config.stages import BatchRamp, LengthOrder, Stage, StagePlan

LINEAR = {"kind": "linear", "start": 1.0, "end": 0.1}


def stage(**fields: Any) -> Stage:
    """A stage with some fields given."""
    plain = {
        "name": "s",
        "tokens": 1000,
        "lengths": {8: 1},
        "batch_tokens": 64,
        "micro_batch_tokens": 64,
        "weights": {"x": 1},
        "learning_rate": LINEAR,
    }
    return parse(Stage, plain | fields)


@st.composite
def batches(draw: st.DrawFn) -> Any:
    if draw(st.booleans()):
        return draw(st.integers(1, 40)) * 16
    start, increment = (16 * draw(st.integers(1, 5)) for _ in range(2))
    end = start + increment * draw(st.integers(1, 6))
    over = draw(st.integers(1, 3000))
    ramp = {"start": start, "end": end, "increment": increment, "over_tokens": over}
    return ramp | {"learning_rate": draw(st.sampled_from(["kept", "sqrt"]))}


@st.composite
def stages(draw: st.DrawFn) -> list[Stage]:
    lengths = st.dictionaries(st.sampled_from([2, 4, 8, 16]), st.integers(1, 5), min_size=1)
    return [
        stage(
            tokens=draw(st.integers(1, 4000)), batch_tokens=draw(batches()), lengths=draw(lengths)
        )
        for _ in range(draw(st.integers(1, 3)))
    ]


def batch_after(batch: int | BatchRamp, tokens: int) -> int:
    """The ramp, read off its definition."""
    if isinstance(batch, int):
        return batch
    count = (batch.end - batch.start) // batch.increment
    return min(batch.end, batch.start + batch.increment * (tokens * count // batch.over_tokens))


@given(stages())
def test_stepping_through_a_run_equals_asking_for_each_step(run: list[Stage]) -> None:
    plan = StagePlan(run)
    seen = step = 0
    for index, current in enumerate(run):
        tokens = step_in_stage = 0
        while tokens < current.tokens:
            assert not plan.finished(seen)
            point = StagePlan(run).at(seen)
            batch = batch_after(current.batch_tokens, tokens)
            assert (point.index, point.stage) == (index, current)
            assert (point.step, point.step_in_stage) == (step, step_in_stage)
            assert (point.tokens_in_stage, point.batch_tokens) == (tokens, batch)
            assert point.length in current.lengths
            assert plan.at(seen + batch - 1) == point
            rate = current.learning_rate.rate(tokens + batch, current.tokens)
            ramp = current.batch_tokens
            if isinstance(ramp, BatchRamp) and ramp.learning_rate == "sqrt":
                rate *= (batch / ramp.end) ** 0.5
            assert point.learning_rate == pytest.approx(rate, rel=1e-12)
            tokens, seen, step, step_in_stage = (
                tokens + batch,
                seen + batch,
                step + 1,
                step_in_stage + 1,
            )
        assert plan.stage_steps[index] == step_in_stage
        assert plan.stage_tokens[index] == tokens
        assert plan.stage_ends[index] == seen
    assert plan.finished(seen)
    assert (plan.total_tokens, plan.total_steps) == (seen, step)
    for outside in (-1, seen):
        with pytest.raises(ValueError, match="outside the run"):
            plan.at(outside)


@given(
    st.dictionaries(st.integers(1, 40), st.integers(1, 9), min_size=1, max_size=5),
    st.integers(1, 400),
)
def test_every_prefix_of_steps_meets_the_ratio_to_within_one_step(
    ratio: dict[int, int], steps: int
) -> None:
    order = LengthOrder(ratio)
    weight = {length: length * part for length, part in ratio.items()}
    had: Counter[int] = Counter()
    for step in range(steps):
        had[order.at(step)] += 1
        for length in ratio:
            due = Fraction(weight[length] * (step + 1), sum(weight.values()))
            assert abs(had[length] - due) < 1


@given(st.dictionaries(st.integers(1, 40), st.integers(1, 9), min_size=1, max_size=4))
def test_one_period_of_steps_holds_the_sequences_in_exactly_the_ratio(
    ratio: dict[int, int],
) -> None:
    order = LengthOrder(ratio)
    batch = math.lcm(*ratio)
    sequences: Counter[int] = Counter()
    for step in range(order.period):
        sequences[order.at(step)] += batch // order.at(step)
    assert len({Fraction(sequences[length], ratio[length]) for length in ratio}) == 1


def test_the_papers_mix_is_three_long_steps_in_eleven() -> None:
    # 3 sequences of 8,192 to 1 of 65,536 is 24,576 tokens to 65,536.
    order = LengthOrder({8192: 3, 65536: 1})
    assert order.period == 11
    lengths = [order.at(step) for step in range(11)]
    assert (lengths.count(8192), lengths.count(65536)) == (3, 8)
    assert not any(a == b == 8192 for a, b in itertools.pairwise(lengths))


def test_the_order_of_lengths_does_not_depend_on_what_was_asked_before() -> None:
    ratio = {8: 3, 24: 2, 64: 1}
    forward = LengthOrder(ratio)
    expected = [forward.at(step) for step in range(50)]
    for step in reversed(range(50)):
        assert LengthOrder(ratio).at(step) == expected[step]


def test_a_run_of_millions_of_steps_is_answered_at_once() -> None:
    plan = StagePlan([stage(tokens=10**12, lengths={4096: 3, 8192: 1}, batch_tokens=8192)] * 3)
    started = time.process_time()
    for tokens in range(0, plan.total_tokens, plan.total_tokens // 1000):
        plan.at(tokens)
    assert plan.total_steps > 300_000_000
    assert time.process_time() - started < 1


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 200])
def test_the_rate_rises_over_the_warm_up_and_ends_at_end(kind: str, warmup: int) -> None:
    segment = {"kind": kind, "start": 1.0, "end": 0.1, "warmup_tokens": warmup}
    if kind == "wsd":
        segment["decay_tokens"] = 300
    plan = StagePlan([stage(tokens=1000, batch_tokens=48, lengths={8: 1}, learning_rate=segment)])
    rates = [plan.at(48 * step).learning_rate for step in range(plan.total_steps)]
    assert rates[0] > 0
    assert rates[-1] == pytest.approx(0.1, rel=1e-12)
    warm = warmup // 48
    assert rates[:warm] == pytest.approx([48 * (i + 1) / 200 for i in range(warm)])
    assert all(a >= b for a, b in zip(rates[warm + 1 :], rates[warm + 2 :], strict=False))
    if kind == "wsd":
        assert rates[warm + 1 : 700 // 48] == [1.0] * (700 // 48 - warm - 1)


def test_the_cosine_is_half_way_in_the_middle() -> None:
    rate = stage(learning_rate={"kind": "cosine", "start": 1.0, "end": 0.0}).learning_rate
    assert rate.rate(500, 1000) == pytest.approx(0.5)
    assert rate.rate(250, 1000) == pytest.approx(0.5 + math.sqrt(0.5) / 2)


def test_micro_batches_are_counted_per_data_rank() -> None:
    point = StagePlan([stage(batch_tokens=512, micro_batch_tokens=64, lengths={16: 1})]).at(0)
    assert (point.rows, point.micro_batch_rows, point.micro_batches(2)) == (32, 4, 4)
