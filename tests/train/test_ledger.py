"""The ledger: whole lines only, attempts numbered, what a resume made void left out."""

import json
import os
import random
from pathlib import Path

import pytest

from megahybrid.errors import MegahybridError
from megahybrid.ledger import EventLine, StepLine, read_every_line, read_ledger
from megahybrid.train.ledger import LedgerWriter
from tests.events import named


def step_line(step: int, stage: str = "short", **fields: object) -> StepLine:
    values: dict = {
        "step": step,
        "stage": stage,
        "tokens": step * 8192,
        "length": 256,
        "source_tokens": {"stdlib": step * 8192},
        "cursor_crc": 12345,
        "learning_rate": 1e-3,
        "loss": 5.0,
        "gradient_norm": 1.0,
        "seconds": {"data": 0.1},
        "time_unix": 1000.0 + step,
    }
    return StepLine(**{**values, **fields})


def event_line(event: str, step: int, **detail: object) -> EventLine:
    return EventLine(event=event, step=step, stage="short", tokens=step * 8192, detail=detail)


def steps_and_losses(path: Path) -> list[tuple[int, float | None]]:
    return [(line.step, line.loss) for line in read_ledger(path).steps]


def test_lines_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "run" / "ledger.jsonl"
    written = [event_line("start", 0), step_line(1), event_line("evaluate", 1, loss=4.5)]
    with LedgerWriter(path) as writer:
        for line in written:
            writer.write(line)
    assert [line.attempt for line in read_ledger(path).lines] == [1, 1, 1]
    assert read_ledger(path).steps[0].source_tokens == {"stdlib": 8192}
    assert named(read_ledger(path), "evaluate")[0].detail == {"loss": 4.5}


def test_each_line_of_the_file_has_the_fields_of_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with LedgerWriter(path) as writer:
        writer.write(step_line(1))
        writer.write(event_line("save", 1))
    step, event = [json.loads(text) for text in path.read_text().splitlines()]
    common = {"kind", "attempt", "step", "stage", "tokens", "time_unix"}
    assert set(step) == common | {
        "length", "source_tokens", "cursor_crc", "learning_rate", "loss", "gradient_norm",
        "gradient_norm_by_kind", "skipped", "tokens_per_second", "mfu", "memory_gib", "seconds",
    }  # fmt: skip
    assert set(event) == common | {"event", "detail"}
    assert (step["kind"], event["kind"]) == ("step", "event")


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with LedgerWriter(path) as writer:
        writer.write(step_line(1, loss=float("nan"), gradient_norm_by_kind={"mlp": float("inf")}))
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()
    assert read_ledger(path).steps[0].loss is None
    assert read_ledger(path).steps[0].gradient_norm_by_kind == {"mlp": None}


def test_a_resume_makes_void_what_earlier_attempts_did_beyond_its_step(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with LedgerWriter(path) as first:
        first.write(event_line("start", 0))
        for step in range(1, 8):
            first.write(step_line(step, loss=1.0))
        first.write(event_line("evaluate", 7))
    with LedgerWriter(path) as second:
        second.write(event_line("resume", 4))
        second.write(step_line(5, loss=2.0))
    with LedgerWriter(path) as third:
        third.write(event_line("resume", 5))
        third.write(step_line(6, loss=3.0))
    expected = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0), (6, 3.0)]
    assert steps_and_losses(path) == expected
    assert named(read_ledger(path), "evaluate") == []
    assert [line.attempt for line in read_ledger(path).steps] == [1, 1, 1, 1, 2, 3]
    assert len(list(read_every_line(path))) == 13


def test_a_resume_further_back_makes_void_several_attempts(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    for start in (0, 3, 1):
        with LedgerWriter(path) as writer:
            writer.write(event_line("resume", start))
            for step in range(start + 1, start + 4):
                writer.write(step_line(step, loss=float(start)))
    assert steps_and_losses(path) == [(1, 0.0), (2, 1.0), (3, 1.0), (4, 1.0)]


@pytest.mark.parametrize("cut", [1, 2, 50, 200])
def test_a_torn_last_line_is_ignored_and_cut_off_by_the_next_attempt(
    tmp_path: Path, cut: int
) -> None:
    path = tmp_path / "ledger.jsonl"
    with LedgerWriter(path) as writer:
        writer.write(step_line(1))
        writer.write(step_line(2))
    path.write_bytes(path.read_bytes()[:-cut])
    assert [line.step for line in read_ledger(path).steps] == [1]
    with LedgerWriter(path) as writer:
        assert writer.attempt == 2
        writer.write(event_line("resume", 1))
        writer.write(step_line(2))
    assert [line.step for line in read_ledger(path).steps] == [1, 2]


def test_a_first_line_torn_at_birth_leaves_an_empty_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"kind":"st')
    assert read_ledger(path).lines == ()
    with LedgerWriter(path) as writer:
        assert writer.attempt == 1
    assert path.read_bytes() == b""


def test_a_line_torn_in_the_middle_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with LedgerWriter(path) as writer:
        for step in (1, 2, 3):
            writer.write(step_line(step))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:40] + "\n" + lines[2])
    with pytest.raises(MegahybridError, match=r"ledger\.jsonl:2 is not a ledger line"):
        read_ledger(path)


def test_a_foreign_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text("one\ntwo\nthree\n")
    with pytest.raises(MegahybridError, match="does not end in a ledger line"):
        LedgerWriter(path)
    assert path.read_text() == "one\ntwo\nthree\n"


def test_a_missing_ledger_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(MegahybridError, match="No such file.*Name the directory of a run"):
        read_ledger(tmp_path / "ledger.jsonl")


def test_a_field_of_a_newer_version_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with LedgerWriter(path) as writer:
        writer.write(step_line(1))
    path.write_text(path.read_text().replace('"step":1', '"step":1,"invented_later":7'))
    assert read_ledger(path).steps[0].step == 1


def test_no_space_is_one_clear_line_and_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.jsonl"
    writer = LedgerWriter(path)
    writer.write(step_line(1))
    real_write, calls = os.write, []

    def full_disk(file: int, content: bytes) -> int:
        calls.append(file)
        if len(calls) == 1:
            return real_write(file, bytes(content)[:30])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full_disk)
    with pytest.raises(MegahybridError, match="No space left on device.*it resumes"):
        writer.write(step_line(2))
    monkeypatch.undo()
    writer.write(step_line(2))
    writer.close()
    assert [line.step for line in read_ledger(path).steps] == [1, 2]


def test_the_last_line_is_found_however_long_the_lines_are(tmp_path: Path) -> None:
    path, draw = tmp_path / "ledger.jsonl", random.Random(1)
    for attempt in range(1, 6):
        with LedgerWriter(path) as writer:
            assert writer.attempt == attempt
            writer.write(event_line("note", attempt, text="x" * draw.randrange(1, 200_000)))
