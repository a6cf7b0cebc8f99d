"""A window or theta that changes while a stage runs: a function of the stage's tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megahybrid.config import RunConfig, check_run
from megahybrid.config.anneal import MOST_STEPS, WINDOW_MULTIPLE
from megahybrid.config.describe import describe, render
from megahybrid.config.summary import summary
from tests.config.example import example


def annealed(anneal: str, *more: str) -> RunConfig:
    """The example with a window of 256 keys, its first stage annealed."""
    return example("model.layer_plan.schemes.local.window=256", f"stages.0.anneal={anneal}", *more)


def values(run: RunConfig, index: int = 0) -> list[tuple[int | None, float]]:
    """(window, theta) of the scheme `local` along a stage."""
    schemes = [part.plan.schemes["local"] for part in run.plans[index]]
    return [(s.window, s.position.theta) for s in schemes]  # type: ignore[union-attr]


def test_a_stage_goes_from_its_own_values_to_those_named() -> None:
    run = annealed("{steps: 5, schemes: {local: {window: 768, position: {theta: 160000}}}}")
    check_run(run)
    assert values(run) == [
        (256, 10000), (384, 20000), (512, 40000), (640, 80000), (768, 160000)
    ]  # fmt: skip
    tokens = run.stages[0].tokens
    assert [part.tokens for part in run.plans[0]] == [-(-tokens * k // 5) for k in range(5)]


def test_a_window_may_shrink_and_what_was_reached_stays_in_the_stages_after() -> None:
    run = annealed("{steps: 4, schemes: {local: {window: 128}}}")
    assert [window for window, _ in values(run)] == [256, 128]
    assert run.plan_at(1).schemes["local"].window == 128
    back = annealed("{schemes: {local: {window: 512}}}", "stages.1.schemes={local: {window: 256}}")
    assert back.plan_at(1).schemes["local"].window == 256


def test_the_plan_in_force_is_that_of_the_tokens_a_step_begins_with() -> None:
    run = annealed("{steps: 3, schemes: {local: {window: 512}}}")
    tokens, plans = 0, []
    while tokens < run.stage_plan.stage_ends[0]:
        point = run.stage_plan.at(tokens)
        plan = run.plan_in_force(tokens)
        # Of any token of the step as well, and the same object until something changes.
        assert run.plan_in_force(tokens + point.batch_tokens - 1) is plan
        held = [p for p in run.plans[0] if p.tokens <= point.tokens_in_stage][-1]
        assert held.plan is plan
        plans.append(plan.schemes["local"].window)
        tokens += point.batch_tokens
    assert plans == sorted(plans) and set(plans) == {256, 384, 512}
    assert run.plan_in_force(tokens) == run.plan_at(1)


@given(first=st.integers(1, 64), last=st.integers(1, 64), steps=st.integers(2, MOST_STEPS))
def test_windows_on_the_way_are_multiples_between_the_ends(
    first: int, last: int, steps: int
) -> None:
    if first == last:
        return
    first, last = first * WINDOW_MULTIPLE, last * WINDOW_MULTIPLE
    run = example(
        f"model.layer_plan.schemes.local.window={first}",
        f"stages.0.anneal={{steps: {steps}, schemes: {{local: {{window: {last}}}}}}}",
    )
    windows = [window for window, _ in values(run)]
    assert (windows[0], windows[-1]) == (first, last)
    assert windows == sorted(windows, reverse=last < first)
    assert len(set(windows)) == len(windows) <= steps
    assert all(window is not None and window % WINDOW_MULTIPLE == 0 for window in windows)


def test_check_and_describe_show_the_steps() -> None:
    run = annealed("{steps: 3, schemes: {local: {window: 512, position: {theta: 1.0e6}}}}")
    rows = describe(run)["stages"][0]["anneal"]
    assert [row["values"]["local.window"] for row in rows] == [256, 384, 512]
    assert [row["tokens"] for row in rows] == [part.tokens for part in run.plans[0]]
    assert rows[0]["step"] == 0 < rows[1]["step"] < rows[2]["step"]
    assert f"  local.window 256, 384 from step {rows[1]['step']}, 512 from" in summary(run)
    assert "local.position.theta 10000, 100000 from step" in summary(run)
    assert f"Annealed in {run.stages[0].name}" in render(describe(run))
    assert "Annealed" not in render(describe(example()))


@pytest.mark.parametrize(
    ("anneal", "words"),
    [
        ("{steps: 17, schemes: {local: {window: 512}}}",
         "stages.0.anneal.steps=17 must be at most 16"),
        ("{steps: 1, schemes: {local: {window: 512}}}", "must be at least 2"),
        ("{schemes: {local: {window: 500}}}", "window=500 must be a multiple of 128. Change it."),
        ("{schemes: {locla: {window: 512}}}", "Did you mean 'local'?"),
        ("{schemes: {local: {theta: 512}}}", "stages.0.anneal.schemes.local.theta is not a field"),
        ("{schemes: {local: {}}}", "changes nothing. Name window or position.theta."),
        ("{schemes: {}}", "has 0 entries and needs 1"),
        ("{schemes: {local: {window: 256}}}", "is what the stage begins with"),
        ("{schemes: {global: {window: 256}}}", "has no window to begin from"),
        ("{schemes: {global: {position: {theta: 5}}}}", "has nothing to act on"),
        ("{schemes: {local: {position: {theta: 10000}}}}", "is what the stage begins with"),
    ],
)  # fmt: skip
def test_what_cannot_be_annealed_is_refused_in_one_line(anneal: str, words: str) -> None:
    from megahybrid.errors import ConfigError

    with pytest.raises(ConfigError) as refusal:
        check_run(annealed(anneal))
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_window_that_is_no_multiple_cannot_be_where_it_begins() -> None:
    from megahybrid.errors import ConfigError

    with pytest.raises(ConfigError, match="begins from window=64, which is no multiple of 128"):
        check_run(example("stages.0.anneal={schemes: {local: {window: 512}}}"))


def test_every_value_on_the_way_has_a_step_of_training() -> None:
    from megahybrid.errors import ConfigError

    run = annealed("{steps: 16, schemes: {local: {position: {theta: 5.0e5}}}}")
    steps = run.stage_plan.stage_steps[0]
    few = run.stages[0].tokens // 10
    assert steps >= 16
    with pytest.raises(ConfigError, match="without a step of training") as refusal:
        short = annealed(
            "{steps: 16, schemes: {local: {position: {theta: 5.0e5}}}}",
            f"stages.0.tokens={few}",
            "stages.0.learning_rate.warmup_tokens=0",
        )
        check_run(short)
    assert "\n" not in str(refusal.value)
