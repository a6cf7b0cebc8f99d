"""How far an evaluation is: a bar where somebody looks, a line a minute in a log."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from megahybrid.config import parse
from megahybrid.config.suite import Suite
from megahybrid.data.held_out import Rows, evaluation_tokens
from megahybrid.evaluate.loss import sliding
from megahybrid.evaluate.progress import EvaluationProgress, in_words
from megahybrid.evaluate.suite import examples_of, suite_tokens
from megahybrid.train.validation import _times_read
from tests.data.corpus import evaluation_batches, write_corpus
from tests.evaluate.characters import material


class Clock:
    """A time that passes when it is told to."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_a_log_has_a_line_a_minute_with_the_share_and_the_time_left() -> None:
    clock, log = Clock(), io.StringIO()
    with EvaluationProgress("scoring", 1000, console=Console(file=log), now=clock) as progress:
        for _ in range(10):
            clock.seconds += 25
            progress.advance(50)
        progress.say("sliding a window")
        clock.seconds += 350
        progress.advance(250)
    assert log.getvalue().splitlines() == [
        "scoring: 15% of 1,000 tokens, ETA 7:05",
        "scoring: 30% of 1,000 tokens, ETA 5:50",
        "scoring: 45% of 1,000 tokens, ETA 4:35",
        "sliding a window: 75% of 1,000 tokens, ETA 3:20",
    ]


def test_less_than_a_minute_leaves_a_log_alone() -> None:
    clock, log = Clock(), io.StringIO()
    with EvaluationProgress("scoring", 10, console=Console(file=log), now=clock) as progress:
        clock.seconds += 59
        progress.advance(10)
    assert log.getvalue() == ""


def test_a_terminal_has_a_bar_with_percent_that_goes_away_again() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    with EvaluationProgress("scoring", 4, console=console) as progress:
        progress.advance(3)
        progress._bar.refresh()
        assert " 75%" in screen.getvalue()
    assert screen.getvalue().rstrip("\n").endswith("\x1b[2K")


def test_times_have_hours_when_they_need_them() -> None:
    assert [in_words(seconds) for seconds in (5, 65, 7400)] == ["0:05", "1:05", "2:03:20"]


@pytest.mark.parametrize("rows", ["stream", "documents"])
def test_the_work_of_rows_is_what_batches_hold(tmp_path: Path, rows: Rows) -> None:
    dataset = write_corpus(tmp_path, [65, 500, 3, 130, 64, 300, 1000, 260])
    batches = evaluation_batches(dataset, 768, 1, rows=rows, multiple=3, max_tokens=5000)
    read = sum(batch.tokens.size for batch in batches)
    assert evaluation_tokens(dataset, 768, rows, max_tokens=5000, multiple=3) == read


@pytest.mark.parametrize(("length", "window"), [(96, 16), (90, 16), (16, 16), (7, 16), (33, 5)])
def test_a_sliding_window_reads_as_often_as_is_said(length: int, window: int) -> None:
    read = 0

    def token_loss(
        tokens: torch.Tensor, targets: torch.Tensor, starts: torch.Tensor
    ) -> torch.Tensor:
        nonlocal read
        read += tokens.numel()
        return torch.zeros(tokens.shape)

    row = torch.zeros(1, length, dtype=torch.int64)
    sliding(token_loss, window, max(1, window // 2))(row, row, row)
    assert round(length * _times_read(length, window)) == read


def test_the_work_of_a_suite_is_that_of_its_examples() -> None:
    needle = {"kind": "needle", "lengths": [200, 160], "depths": [0.0, 0.5, 1.0], "trials": 2}
    recall = {"kind": "recall", "lengths": [32], "trials": 3}
    suite = parse(Suite, {"tasks": {"one": needle, "many": recall}})
    read = [
        len(example.tokens)
        for name, task in suite.tasks.items()
        for example in examples_of(name, task, suite.seed, material())
    ]
    assert suite_tokens(suite) == sum(read)
