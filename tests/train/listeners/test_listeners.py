"""Listeners: everyone is told, failures are kept apart, the ledger and TensorBoard get it all."""

from dataclasses import replace
from pathlib import Path

import pytest

from megahybrid.ledger import ContextGainEvent, EventLine, GainBucket, StageEvent, read_ledger
from megahybrid.train.listeners import LedgerListener, Listeners, TensorBoardListener
from megahybrid.train.listeners.scalars import event_scalars
from tests.train.listeners.example import EVALUATION, Memory, run_info, step_line


def test_events_carry_the_step_stage_and_tokens_they_happened_at(tmp_path: Path) -> None:
    memory = Memory()
    listeners = Listeners([memory])
    listeners.on_start(run_info(tmp_path))
    listeners.on_step(step_line(8))
    listeners.on_event(StageEvent(index=1), stage="long")
    listeners.on_event(EVALUATION)
    listeners.on_end("done")
    assert memory.names() == ["start", "stage", "evaluate", "end"]
    assert [(e.step, e.stage, e.tokens) for e in memory.events] == [
        (0, "short", 0),
        (8, "long", 800),
        (8, "long", 800),
        (8, "long", 800),
    ]
    assert memory.events[2].content == EVALUATION
    assert memory.events[2].detail == EVALUATION.detail()
    assert memory.outcomes == ["done"]


def test_an_attempt_that_goes_on_is_told_as_a_resume(tmp_path: Path) -> None:
    memory = Memory()
    Listeners([memory]).on_start(run_info(tmp_path, step=5))
    assert (memory.events[0].event, memory.events[0].step) == ("resume", 5)
    assert memory.events[0].detail == {"world_size": 1, "device": "cpu"}


def test_a_failing_listener_is_dropped_once_and_the_others_hear_why(tmp_path: Path) -> None:
    memory, broken = Memory(), Memory(raise_at_step=2)
    listeners = Listeners([broken, memory])
    listeners.on_start(run_info(tmp_path))
    for step in (1, 2, 3):
        listeners.on_step(step_line(step))
    listeners.on_end("done")
    assert memory.names() == ["start", "listener_failed", "end"]
    assert memory.events[1].detail["listener"] == "Memory"
    assert "the pipe" in memory.events[1].detail["reason"]
    assert [line.step for line in memory.steps] == [1, 2, 3]
    assert [line.step for line in broken.steps] == [1]
    assert broken.outcomes == []


def test_the_failure_of_an_essential_listener_ends_the_run(tmp_path: Path) -> None:
    listeners = Listeners([Memory(essential=True, raise_at_step=1)])
    listeners.on_start(run_info(tmp_path))
    with pytest.raises(OSError, match="the pipe"):
        listeners.on_step(step_line(1))


def test_all_listeners_may_fail_and_the_run_goes_on(tmp_path: Path) -> None:
    listeners = Listeners([Memory(raise_at_step=1), Memory(raise_at_step=1)])
    listeners.on_start(run_info(tmp_path))
    listeners.on_step(step_line(1))
    listeners.on_step(step_line(2))
    listeners.on_end("done")


def test_the_ledger_listener_writes_all_and_hears_of_failures_at_the_end(tmp_path: Path) -> None:
    class FailsToEnd(Memory):
        def on_end(self, outcome: str) -> None:
            raise RuntimeError("too late")

    ledger = LedgerListener(tmp_path)
    listeners = Listeners([ledger, FailsToEnd()])
    listeners.on_start(run_info(tmp_path))
    listeners.on_step(step_line(1))
    listeners.on_event(EVALUATION)
    listeners.on_end("done")
    lines = read_ledger(tmp_path / "ledger.jsonl")
    assert [line.event for line in lines.events] == ["start", "evaluate", "end", "listener_failed"]
    assert lines.steps[0].gradient_norm_by_kind == {"attention": 1.0}
    assert LedgerListener(tmp_path).attempt == 2


def test_tensorboard_files_hold_the_numbers_over_tokens(tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is optional"
    )
    listeners = Listeners([TensorBoardListener()])
    listeners.on_start(run_info(tmp_path))
    for step in (1, 2):
        listeners.on_step(step_line(step))
    listeners.on_event(EVALUATION)
    listeners.on_end("done")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [(one.step, one.value) for one in events.Scalars("train/loss")]
    assert losses == [(100, pytest.approx(4.9)), (200, pytest.approx(4.8))]
    assert events.Scalars("held_out/stdlib/loss")[0].value == pytest.approx(4.25)
    assert "held_out/stdlib/loss_at_50_100" not in events.Tags()["scalars"]


def test_context_gain_has_a_number_for_each_context_and_position() -> None:
    event = ContextGainEvent(
        set="stdlib", context=32, stride=16, length=128, tokens=900, documents=9, loss=4.0,
        gain=0.5, low=0.25, high=0.75,
        by_position=(GainBucket(32, 64, 600, 9, 0.25), GainBucket(64, 128, 0, 0, None)),
    )  # fmt: skip
    assert event_scalars(EventLine.of(event, step=1, stage="short", tokens=100)) == {
        "context_gain/stdlib/32/gain": 0.5,
        "context_gain/stdlib/32/low": 0.25,
        "context_gain/stdlib/32/high": 0.75,
        "context_gain/stdlib/32/gain_at_32_64": 0.25,
    }


def test_both_kinds_of_rows_of_a_held_out_set_keep_names_of_their_own() -> None:
    def scalars(rows: str) -> dict[str, float]:
        event = replace(EVALUATION, rows=rows)
        return event_scalars(EventLine.of(event, step=1, stage="short", tokens=100))

    assert scalars("stream") == {"held_out/stdlib/loss": 4.25, "held_out/stdlib/loss_at_0_50": 4.25}
    assert set(scalars("documents")) == {
        "held_out/stdlib_documents/loss", "held_out/stdlib_documents/loss_at_0_50",
    }  # fmt: skip
