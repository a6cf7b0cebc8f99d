"""Steps that a resume repeats come out as the ledger has them, or somebody hears of it."""

import json
import signal
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megahybrid.config import load
from megahybrid.errors import EXIT_DO_NOT_RESTART
from megahybrid.ledger import EventLine, Line, StepLine, read_every_line, read_ledger
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.train.repeated import (
    TOLERATED_STEPS,
    DecisionHistory,
    EarlierStep,
    Repeatable,
    difference,
    repeatable,
    steps_beyond,
)
from tests.events import named
from tests.train.example import RUN, STEPS, arithmetic_of, steps_so_far
from tests.train.forked import Nursery, Ranks
from tests.train.test_ledger import step_line

SAME = Repeatable("c", "l")


def event(name: str, step: int, attempt: int, **detail: Any) -> EventLine:
    return EventLine(
        event=name, step=step, stage="short", tokens=step, detail=detail, attempt=attempt
    )


def attempt(
    number: int, begin: int, *steps: int, crc: int = 0, told: Repeatable | None = SAME
) -> list[Line]:
    """An attempt's lines; `crc` says which data it had."""
    detail = {"repeatable": asdict(told)} if told else {}
    lines: list[Line] = [event("resume" if begin else "start", begin, number)]
    lines.append(event("stage", begin, number, **detail))
    return lines + [step_line(s, attempt=number, cursor_crc=crc + s, loss=1.0) for s in steps]


def back(number: int, step: int, *steps: int, crc: int) -> list[Line]:
    """The same attempt went back to `step` and on with other data."""
    lines = attempt(number, step, *steps, crc=crc)
    return [event("rewind", step, number), *lines[1:]]


def crcs(lines: Sequence[Line], step: int) -> dict[int, int]:
    return {at: earlier.cursor_crc - at for at, earlier in steps_beyond(lines, step)[0].items()}


def test_only_steps_beyond_the_checkpoint_and_of_the_newest_attempt_that_reached_them() -> None:
    lines = attempt(1, 0, *range(1, 11)) + attempt(2, 4, 5, 6, 7, crc=100) + attempt(3, 4, 5)
    assert crcs(lines, 4) == {5: 0, 6: 100, 7: 100, 8: 0, 9: 0, 10: 0}
    assert crcs(lines, 6) == {7: 100, 8: 0, 9: 0, 10: 0}
    assert crcs(lines, 10) == {}
    assert [earlier.attempt for earlier in steps_beyond(lines, 4)[0].values()].count(2) == 2


def test_lines_of_an_attempt_that_told_nothing_are_not_compared() -> None:
    """As a version before this one wrote them; where it was the newest, nothing is known."""
    assert crcs(attempt(1, 0, 1, 2, 3, told=None), 0) == {}
    lines = attempt(1, 0, 1, 2, 3) + attempt(2, 0, 1, 2, told=None)
    assert crcs(lines, 0) == {3: 0}
    strange = {"repeatable": {"config": "c", "layout": "l", "more": 1}}
    unknown = [event("start", 0, 1), event("stage", 0, 1, **strange), step_line(1, attempt=1)]
    assert steps_beyond(unknown, 0) == ({}, DecisionHistory())


def test_a_rewind_parts_the_lines_before_it_from_those_after() -> None:
    spike = attempt(1, 0, *range(1, 10)) + back(1, 6, 7, 8, crc=500)
    # From the checkpoint it went back to, the data after the spike come again.
    assert crcs(spike, 6) == {7: 500, 8: 500}
    # From one before, the data of the spike come again, and the spike.
    assert crcs(spike, 3) == {4: 0, 5: 0, 6: 0, 7: 0, 8: 0, 9: 0}
    # A checkpoint after the rewind holds the other data.
    assert crcs(spike, 7) == {8: 500}
    twice = spike + back(1, 6, 7, crc=900)
    assert crcs(twice, 6) == {7: 900}


def test_an_attempt_from_before_a_rewind_is_another_path() -> None:
    """Checkpoint 6 was damaged: attempt 2 began at 3 and never saw the data after the spike."""
    lines = attempt(1, 0, *range(1, 10)) + back(1, 6, 7, 8, 9, 10, crc=500)
    lines += attempt(2, 3, 4, 5, 6, 7, crc=0)
    assert crcs(lines, 6) == {7: 0, 8: 0, 9: 0}
    assert crcs(lines, 3) == {4: 0, 5: 0, 6: 0, 7: 0, 8: 0, 9: 0}


def test_another_order_that_was_meant_voids_what_came_before_it() -> None:
    lines = attempt(1, 0, *range(1, 8)) + attempt(
        2, 3, 4, 5, crc=70, told=Repeatable("c", "l", True)
    )
    assert crcs(lines, 3) == {4: 70, 5: 70}


LOSS = 2.0
ALIKE = DecisionHistory().with_step(1, SAME)
CASES: dict[str, tuple[dict[str, Any], Repeatable, str, bool, str | None]] = {
    "the same": ({}, SAME, "fp32", True, None),
    "one bit": ({"loss": LOSS * (1 + 2**-52)}, SAME, "fp32", True, "loss"),
    "one bit where bits do not repeat": ({"loss": LOSS * (1 + 2**-52)}, SAME, "fp32", False, None),
    "one bit on another layout": (
        {"loss": LOSS * (1 + 2**-52)}, replace(SAME, layout="m"), "fp32", True, None,
    ),
    "within fp32": ({"loss": LOSS * 1.00009}, SAME, "fp32", False, None),
    "beyond fp32": ({"loss": LOSS * 1.0002}, SAME, "fp32", False, "loss"),
    "within bf16": ({"loss": LOSS * 1.0019}, SAME, "bf16", False, None),
    "beyond bf16": ({"loss": LOSS * 1.003}, SAME, "bf16", False, "loss"),
    "no number": ({"loss": float("nan")}, SAME, "fp32", True, "loss"),
    "other cursors": ({"cursor_crc": 8}, SAME, "fp32", False, "cursor_crc"),
    "other cursors on another layout": (
        {"cursor_crc": 8}, replace(SAME, layout="m"), "bf16", False, "cursor_crc",
    ),
    "all else on purpose": (
        {"cursor_crc": 8, "loss": 5.0}, replace(SAME, config="d"), "fp32", True, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_counts_as_the_same(case: str) -> None:
    changes, told, precision, deterministic, expected = CASES[case]
    line = replace(step_line(7, loss=LOSS, cursor_crc=7), **changes)
    now = DecisionHistory().with_step(1, told)
    found = difference(line, EarlierStep(3, 7, LOSS, ALIKE), now, precision, deterministic)
    assert (found and found.field) == expected
    if found is not None:
        assert found.message.startswith("step 7 was repeated with ")
        assert found.message.endswith("of attempt 3") and "\n" not in found.message


def test_no_number_twice_is_the_same() -> None:
    line = step_line(7, loss=float("inf"), cursor_crc=7)
    assert difference(line, EarlierStep(3, 7, None, ALIKE), ALIKE, "fp32", True) is None


OTHER = {"config": Repeatable("d", "l"), "layout": Repeatable("c", "m"), "nothing told": None}


@pytest.mark.parametrize("change", OTHER)
def test_a_change_that_was_taken_back_parts_the_steps_after_it(change: str) -> None:
    """Attempt 3 goes on at step 8, which attempt 2 did otherwise; attempt 1 never came that way."""
    lines = attempt(1, 0, *range(1, 13)) + attempt(2, 6, 7, 8, told=OTHER[change])
    earlier, history = steps_beyond(lines, 8)
    now = history.with_step(9, SAME)
    other_data = step_line(9, cursor_crc=1, loss=1.0)
    other_loss = step_line(9, cursor_crc=9, loss=1.0 + 2**-50)
    found = [difference(x, earlier[9], now, "fp32", True) for x in (other_data, other_loss)]
    # Data do not depend on the layout; losses do, by their last bits.
    expected = ["cursor_crc", None] if change == "layout" else [None, None]
    assert [each and each.field for each in found] == expected
    # From before the change it is the same again.
    earlier, history = steps_beyond(lines, 6)
    found = [
        difference(x, earlier[9], history.with_step(7, SAME), "fp32", True)
        for x in (other_data, other_loss)
    ]
    assert [each and each.field for each in found] == ["cursor_crc", "loss"]


def test_last_bits_may_grow_after_some_steps() -> None:
    """Attempts 1 and 3 parted at step 6, and not at step 60, where attempt 3 begins."""
    lines = attempt(1, 0, *range(1, 90)) + attempt(2, 6, *range(7, 62))
    earlier, history = steps_beyond(lines, 60)
    assert [earlier[step].parted for step in (61, 62)] == [60, 6]
    differs = [
        difference(step_line(s, cursor_crc=s, loss=1.1), earlier[s], history, "fp32", exact)
        for s, exact in ((61, False), (62, False), (62, True))
    ]
    assert [each is not None for each in differs] == [True, False, True]
    assert TOLERATED_STEPS < 56


CHANGES = {  # what may be compared of stage 1 (of 0, 1, 2) afterwards: bits, losses or nothing
    "checkpoint.every_steps=7": "bits",
    "evaluate.every_steps=null": "bits",
    "stages.2.learning_rate.start=9.0e-3": "bits",
    "stages.1.micro_batch_tokens=256": "losses",
    "parallel.zero_stage=2": "losses",
    "kernels.full=reference": "losses",
    "seed=2": "nothing",
    "optimizer.eps=1.0e-6": "nothing",
    "stages.1.learning_rate.start=9.0e-3": "nothing",
    "stages.0.weights.code=1": "nothing",
    "data.lanes=8": "nothing",
    "data.sources.books.path=code": "bits",  # which files lie there is what counts
    "precision=bf16": "nothing",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_decides_what_is_compared(change: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    mesh = ParallelMesh.single(device="cpu")
    plain, changed = (load(tmp_path / "run.yaml", words) for words in ([], [change]))
    files = {"books": "f", "code": "g"}
    a, b = (repeatable(run, 1, mesh, {"full": "sdpa"}, None, files) for run in (plain, changed))
    same = {"bits": (True, True), "losses": (True, False)}.get(CHANGES[change])
    if same is None:
        assert a.config != b.config
    else:
        assert (a.config == b.config, a.layout == b.layout) == same
    assert repeatable(plain, 1, mesh, {"full": "reference"}, None, files).layout != a.layout
    assert repeatable(plain, 1, mesh, {"full": "sdpa"}, {"step": 1}, files).config != a.config


def test_only_files_that_were_read_decide_what_is_compared(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    run, mesh = load(tmp_path / "run.yaml", []), ParallelMesh.single(device="cpu")

    def config(index: int, **files: str) -> str:
        return repeatable(run, index, mesh, {}, None, files).config

    assert config(0, books="f", code="g") == config(0, books="f", code="h")
    assert config(0, books="f", code="g") != config(0, books="h", code="g")
    assert config(1, books="f", code="g") != config(1, books="f", code="h")


def killed_after(example: Path, nursery: Nursery, step: int, *more: str, world: int = 1) -> Path:
    """A run that has steps beyond its newest checkpoint, that of step 6."""
    arguments = ["train", "run.yaml", "directory=run", *more]
    ranks = Ranks(nursery, arguments, world, example, fault="slow_steps")
    run = example / "run"
    newest = run / "checkpoints/step-00000006/manifest.json"
    assert ranks.until(lambda: steps_so_far(run) >= step and newest.exists()), ranks.text()
    ranks.send(signal.SIGKILL)
    ranks.wait()
    for later in (run / "checkpoints").glob("step-*"):
        assert later.name <= "step-00000006"
    return run


def differences(run: Path) -> list[EventLine]:
    return named(read_ledger(run / "ledger.jsonl"), "repeat_differs")


def go_on(
    example: Path, nursery: Nursery, *more: str, fault: str | None = None, world: int = 1
) -> Ranks:
    arguments = ["train", "run.yaml", "directory=run", *more]
    return Ranks(nursery, arguments, world, example, fault=fault)


@pytest.mark.parametrize("world", [1, 2])
def test_another_cursor_ends_the_run_before_anything_is_saved(
    world: int, nursery: Nursery, example: Path
) -> None:
    run = killed_after(example, nursery, 8, world=world)
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    ranks = go_on(example, nursery, fault="a_cursor_too_far", world=world)
    assert ranks.wait() == [EXIT_DO_NOT_RESTART] * world, ranks.text()
    assert "megahybrid: step 7 was repeated with cursor_crc=" in ranks.last_line()
    assert "Traceback" not in ranks.text()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before
    lines = list(read_every_line(run / "ledger.jsonl"))
    assert not [line for line in lines if isinstance(line, StepLine) and line.attempt == 2]
    # It was the fault and no lasting harm: the same command goes on, and comes to the same end.
    after = go_on(example, nursery, world=world)
    assert after.wait() == [0] * world, after.text()
    assert len(arithmetic_of(run)) == STEPS and not differences(run)


@pytest.mark.parametrize("fault", ["a_moment_lost", "a_rate_a_hundredth_higher"])
def test_another_moment_or_rate_is_told_once_and_the_run_goes_on(
    fault: str, nursery: Nursery, example: Path
) -> None:
    run = killed_after(example, nursery, 8, "parallel.tensor=2", world=2)
    ranks = go_on(example, nursery, "parallel.tensor=2", fault=fault, world=2)
    assert ranks.wait() == [0, 0], ranks.text()
    (told,) = differences(run)
    # The update after the checkpoint is the first that differs, and the loss after it shows that.
    assert (told.step, told.detail["field"], told.detail["attempt"]) == (8, "loss", 1)
    assert told.detail["before"] != told.detail["now"]
    (warning,) = named(read_ledger(run / "ledger.jsonl"), "warning")
    assert warning.detail["message"] in ranks.text().replace("\n", " ")


def test_the_same_steps_are_no_news_on_the_same_layout_or_another(
    nursery: Nursery, example: Path
) -> None:
    run = killed_after(example, nursery, 8, "optimizer.eps=1e-5")
    ranks = go_on(example, nursery, "optimizer.eps=1e-5", "parallel.tensor=2", world=2)
    assert ranks.until(lambda: (run / "checkpoints/step-00000009/manifest.json").exists())
    ranks.send(signal.SIGKILL)
    ranks.wait()
    after = go_on(example, nursery, "optimizer.eps=1e-5")
    assert after.wait() == [0], after.text()
    assert not differences(run) and not named(read_ledger(run / "ledger.jsonl"), "warning")


def test_a_run_of_the_version_before_goes_on(nursery: Nursery, example: Path) -> None:
    """Its lines say nothing of what decided them: they are passed over, whatever they hold."""
    run = killed_after(example, nursery, 8)
    path = run / "ledger.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    for line in lines:
        line.get("detail", {}).pop("repeatable", None)
        if line["kind"] == "step" and line["step"] > 6:
            line["cursor_crc"] += 1
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ranks = go_on(example, nursery)
    assert ranks.wait() == [0], ranks.text()
    assert len(arithmetic_of(run)) == STEPS


def test_another_order_may_be_meant(nursery: Nursery, example: Path) -> None:
    run = killed_after(example, nursery, 8)
    ranks = go_on(example, nursery, "--allow", "data", fault="a_cursor_too_far")
    assert ranks.wait() == [0], ranks.text()
    assert len(arithmetic_of(run)) == STEPS
