"""Suites, gates and samples of attention while a model trains."""

import json
from pathlib import Path
from typing import Any

import pytest

from megahybrid.cli import main
from megahybrid.ledger import LEDGER_NAME, EventLine, read_ledger
from tests.events import named
from tests.train.example import arithmetic_of
from tests.train.forked import Nursery, Ranks

SUITE = """
seed: 3
tasks:
  copy: {kind: copy, lengths: [24, 64], trials: 6}
  recall: {kind: recall, lengths: [48], pairs: 3, trials: 6}
"""
ASKED = ["evaluate.suites={puzzles: {path: puzzles.yaml, every_steps: 3}}"]
SAMPLED = ["evaluate.attention_every_steps=2"]


@pytest.fixture
def folder(example: Path) -> Path:
    (example / "puzzles.yaml").write_text(SUITE)
    return example


def train(nursery: Nursery, folder: Path, directory: str, *more: str, world: int = 1) -> Ranks:
    words = ["train", "run.yaml", f"directory={directory}", "evaluate.every_steps=null", *more]
    return Ranks(nursery, words, world, folder)


def events(run: Path, name: str) -> list[EventLine]:
    return named(read_ledger(run / LEDGER_NAME), name)


def scores(run: Path, step: int) -> dict[str, Any]:
    path = run / "evaluations" / f"step-{step:08d}.suite.puzzles.json"
    return json.loads(path.read_text())["tasks"]


def test_asking_changes_no_step_and_scores_as_the_command_does(
    nursery: Nursery, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert train(nursery, folder, "plain").wait() == [0]
    for directory, more, world in (("one", [], 1), ("two", ["parallel.tensor=2"], 2)):
        ranks = train(nursery, folder, directory, *ASKED, *SAMPLED, *more, world=world)
        assert ranks.wait() == [0] * world, ranks.text()
    assert arithmetic_of(folder / "one") == arithmetic_of(folder / "plain")
    for run in (folder / "one", folder / "two"):
        # Every third step, and where stages end: 4, 10 and 16.
        assert [line.step for line in events(run, "suite")] == [3, 4, 6, 9, 10, 12, 15, 16]
        assert [line.step for line in events(run, "attention")] == [2, 6, 8, 12, 14]
        for line in events(run, "attention"):
            assert set(line.detail["by_kind"]) == {"local", "global"}
            for part in line.detail["layers"]:
                assert sum(part["mass"].values()) == pytest.approx(1, abs=1e-5)
    alike = (scores(folder / name, 16)["copy"]["by_length"] for name in ("one", "two"))
    for single, double in zip(*alike, strict=True):
        assert double["log_likelihood"] == pytest.approx(single["log_likelihood"], rel=1e-4)

    monkeypatch.chdir(folder)
    during = scores(folder / "one", 16)
    assert main(["evaluate", "one", "puzzles.yaml", "--json"]) == 0
    after = json.loads(capsys.readouterr().out)["tasks"]
    for task in during:
        for row, again in zip(during[task]["rows"], after[task]["rows"], strict=True):
            assert row == pytest.approx(again, rel=1e-5)

    assert main(["evaluate", "one", "--beyond", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told["rows"]) == ["512", "1024", "2048", "4096"]
    tokens = {scores["held"]["tokens"] for scores in told["rows"].values()}
    assert len(tokens) == 1 and tokens.pop() > 500  # the same ones, however they are cut
    assert told["sliding"]["held"]["loss"] > 0
    assert (folder / "one" / "evaluations" / "step-00000016.loss.held_out.json").exists()


def test_asking_gathers_weights_that_zero_3_has_cut_up(nursery: Nursery, folder: Path) -> None:
    cut = ["parallel.zero_stage=3", "stages.1.tokens=2048", "stages.2.tokens=1024"]
    for directory, more, world in (
        ("plain", cut, 2), ("asked", [*cut, *ASKED, *SAMPLED], 2), ("whole", [*cut[1:], *ASKED], 1)
    ):  # fmt: skip
        ranks = train(nursery, folder, directory, *more, world=world)
        assert ranks.wait() == [0] * world, ranks.text()
    assert arithmetic_of(folder / "asked") == arithmetic_of(folder / "plain")
    assert [line.step for line in events(folder / "asked", "suite")] == [3, 4, 6, 7]
    for step in (3, 7):
        ours, expected = (scores(folder / name, step) for name in ("asked", "whole"))
        for task in expected:
            for row, other in zip(ours[task]["rows"], expected[task]["rows"], strict=True):
                assert row["log_likelihood"] == pytest.approx(other["log_likelihood"], rel=1e-4)


GATE = "stages.0.gates=[{kind: suite, suite: puzzles, task: copy, length: 24, at_least: 0.9}]"


def test_a_gate_that_is_not_passed_stops_the_run_and_keeps_its_checkpoint(
    nursery: Nursery, folder: Path
) -> None:
    run = folder / "gated"
    ranks = train(nursery, folder, "gated", ASKED[0], GATE)
    assert ranks.wait() == [93]
    told = (
        "stages.0.gates: stage short did not pass: exact of puzzles.copy at 24 tokens is 0, and at "
        "least 0.9 was asked for (step 4; its checkpoint is kept)."
    )
    assert told in ranks.text()
    assert (run / "checkpoints" / "step-00000004" / "manifest.json").exists()
    (line,) = events(run, "gate")
    assert (line.step, line.detail["ok"], line.detail["value"]) == (4, False, 0.0)
    # The same command stops at the same place, without a step or a question more.
    again = train(nursery, folder, "gated", ASKED[0], GATE)
    assert again.wait() == [93] and told in again.text()
    assert len(events(run, "suite")) == 2
    # A gate may change while a run goes on.
    lower = "stages.0.gates=[{kind: loss, set: held, at_most: 20}]"
    ranks = train(nursery, folder, "gated", ASKED[0], lower)
    assert ranks.wait() == [0], ranks.text()
    assert [line.detail["ok"] for line in events(run, "gate")] == [False, False, True]
    assert arithmetic_of(run)[-1][0] == 16


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["stages.0.gates=[{kind: loss, set: hold, at_most: 3}]"],
         "stages.0.gates.0.set names 'hold', which data.held_out does not define. "
         "Did you mean 'held'?"),
        ([*ASKED, GATE.replace("puzzles", "puzzle")],
         "stages.0.gates.0.suite names 'puzzle', which evaluate.suites does not define. "
         "Did you mean 'puzzles'?"),
        ([*ASKED, GATE.replace("task: copy", "task: copi")],
         "stages.0.gates.0.task names 'copi', which suite puzzles does not have. "
         "Did you mean 'copy'?"),
        ([*ASKED, GATE.replace("length: 24", "length: 25")],
         "stages.0.gates.0.length=25 is not asked by puzzles.copy (lengths: 24, 64)."),
        ([*ASKED, GATE.replace("at_least", "figure: score, at_least")],
         "stages.0.gates.0.figure=score is no figure of a copy task."),
        (["evaluate.suites={a: {path: none.yaml}}"], "none.yaml"),
        ([*ASKED, "evaluate.suites.puzzles.path=needle.yaml"],
         "data.tokenizer=null: needles are text and need one."),
        ([GATE], "which evaluate.suites does not define."),
    ],
    ids=["set", "suite", "task", "length", "figure", "file", "tokenizer", "no_suite"],
)  # fmt: skip
def test_what_cannot_be_asked_is_one_line_before_anything_starts(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    more: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    (folder / "needle.yaml").write_text("tasks: {one: {kind: needle, lengths: [512]}}")
    assert main(["train", "run.yaml", "directory=r", *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (folder / "r").exists()
