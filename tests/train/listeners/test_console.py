"""The console: calm lines in a log, a bar on a terminal, the same facts in both."""

import io
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from megahybrid.ledger import EventLine
from megahybrid.train.listeners import Console, Listeners
from megahybrid.train.listeners.console import describe_event, duration_text, tokens_text
from tests.train.listeners.example import EVALUATION, run_info, step_line


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def tell(console: Console, directory: Path, clock: Clock, steps: int = 16) -> None:
    listeners = Listeners([console])
    listeners.on_start(run_info(directory))
    for step in range(1, steps + 1):
        clock.seconds += 1.0
        listeners.on_step(step_line(step))
    listeners.on_event(EVALUATION)
    listeners.on_end("done")


def plain_lines(directory: Path, **options: float) -> list[str]:
    output, clock = io.StringIO(), Clock()
    rich = RichConsole(file=output, width=40, highlight=False)
    tell(Console(rich, now=clock, **options), directory, clock)  # type: ignore[arg-type]
    return output.getvalue().splitlines()


def test_a_log_has_a_line_at_each_stage_and_then_at_the_given_pace(tmp_path: Path) -> None:
    steps = [line for line in plain_lines(tmp_path, plain_seconds=5.0) if "tokens/s" in line]
    assert [line.split("|")[2].strip() for line in steps] == [
        "step 1", "step 6", "step 9", "step 14", "step 16",
    ]  # fmt: skip


def test_a_line_says_stage_step_loss_speed_mfu_and_time_left(tmp_path: Path) -> None:
    lines = plain_lines(tmp_path)
    assert lines[0] == "demo starts: 0 of 1,600 tokens"
    assert lines[1] == (
        "short | 100/1,600 | step 1 | loss 4.9000 | lr 1.00e-03 | 5,000 tokens/s | MFU – | ETA 0:15"
    )
    assert lines[-2] == "held-out stdlib: loss 4.2500 at length 50 (step 16, 1,000 tokens)"
    assert lines[-1] == "done at step 16, 1,600 tokens"


def test_a_skipped_update_is_always_shown(tmp_path: Path) -> None:
    output = io.StringIO()
    console = Console(RichConsole(file=output, width=200), now=Clock())
    console.on_start(run_info(tmp_path))
    console.on_step(step_line(1))
    console.on_step(step_line(2, skipped=True, loss=None))
    assert "loss not finite (update skipped)" in output.getvalue()


def test_a_terminal_shows_a_bar_and_leaves_only_events_behind(tmp_path: Path) -> None:
    output, clock = io.StringIO(), Clock()
    rich = RichConsole(file=output, force_terminal=True, width=120, highlight=False)
    tell(Console(rich, now=clock), tmp_path, clock)
    assert "━" in output.getvalue()
    assert "held-out stdlib" in output.getvalue()
    assert "5,000 tokens/s" in output.getvalue()


def test_names_that_look_like_markup_are_printed_as_they_are(tmp_path: Path) -> None:
    output = io.StringIO()
    console = Console(RichConsole(file=output, width=200), now=Clock())
    console.on_start(run_info(tmp_path))
    console.on_step(step_line(1, stage="[red]short[/nothing]"))
    assert "[red]short[/nothing]" in output.getvalue()


@pytest.mark.parametrize(
    ("tokens", "text"), [(0, "0"), (1234, "1,234"), (1_234_567, "1.23M"), (2 * 10**12, "2.00T")]
)
def test_tokens_are_short(tokens: int, text: str) -> None:
    assert tokens_text(tokens) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–"), (75.0, "1:15"), (3675.0, "1:01:15"), (260_000.0, "3.0 days")]
)
def test_durations_are_short(seconds: float | None, text: str) -> None:
    assert duration_text(seconds) == text


def test_a_checkpoint_is_announced_with_its_place_and_size(tmp_path: Path) -> None:
    detail = {"ok": True, "path": "runs/demo/checkpoints/step-00000050", "bytes": 24_500_000}
    line = EventLine(event="save", step=50, stage="short", tokens=100, detail=detail)
    assert describe_event(line) == "saved runs/demo/checkpoints/step-00000050 (24.5 MB, 0.0 s)"


@pytest.mark.parametrize(
    ("event", "detail", "text"),
    [
        ("attention", {"by_kind": {}}, None),
        ("suite", {"suite": "all", "tasks": {
            "single": {"kind": "needle", "exact": {"64": 0.5, "128": 0.25}},
            "ruler": {"kind": "ruler", "score": {"vt/64": 1.0}},
        }}, "suite all: single exact 0.25–0.50, ruler score 1.00 (step 4)"),
        ("gate", {"gate": "loss on a", "value": 3.25, "bound": "at most 3", "ok": False},
         "gate NOT passed: loss on a is 3.25, at most 3 asked"),
    ],
)  # fmt: skip
def test_what_is_asked_while_training_is_a_line(event: str, detail: dict, text: str | None) -> None:
    line = EventLine(event=event, step=4, stage="short", tokens=400, detail=detail)
    assert describe_event(line) == text
