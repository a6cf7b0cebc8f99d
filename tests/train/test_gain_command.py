"""`evaluate --context-gain` on checkpoints of a real run, and the same at its stages' ends."""

import json

import pytest

from megahybrid.config import RunConfig, load, parse
from megahybrid.config.check import problems
from megahybrid.ledger import ContextGainEvent, read_ledger
from tests.train.text_run import Trained, call, refused

CPU = ("--device", "cpu")


def test_the_command_repeats_what_the_run_told_at_the_end_of_each_stage(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    events = [event for _, event in read_ledger(trained.run / "ledger.jsonl").of(ContextGainEvent)]
    asked = [(16, 100), (64, 100)]  # the longest of each stage, and what the file names
    assert [one.context for one in events] == [context for both in asked for context in both]
    for step, contexts in zip((4, 8), asked, strict=True):
        checkpoint = trained.run / "checkpoints" / f"step-{step:08d}"
        command = ("evaluate", checkpoint, "--context-gain", *contexts, "--json", *CPU)
        told = json.loads(call(capsys, *command))
        at_step = [one for one in events if one.step == step]
        for gain, event in zip(told["context_gain"], at_step, strict=True):
            for name in ("set", "context", "stride", "length", "tokens", "documents", "bytes"):
                assert gain[name] == getattr(event, name)
            for name in ("loss", "gain", "low", "high"):
                assert gain[name] == pytest.approx(getattr(event, name), abs=1e-5)
            assert event.tokens and event.documents > 1
            for ours, theirs in zip(gain["by_position"], event.by_position, strict=True):
                assert (ours["tokens"], ours["documents"]) == (theirs.tokens, theirs.documents)
                assert ours["gain"] == (theirs.gain and pytest.approx(theirs.gain, abs=1e-5))
        kept = trained.run / "evaluations" / f"step-{step:08d}.context_gain.held_out.json"
        assert json.loads(kept.read_text()) == told


def test_tables_say_what_is_shown_and_of_how_many_documents(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    text = call(capsys, "evaluate", trained.run, "--context-gain", "--stride", 3, *CPU)
    assert "unseen, by position in the document (shown: 64 to 66 tokens)" in text
    assert "64 – 127" in text and "beyond 64" in text and "kept in" in text


def test_numbers_that_mean_nothing_are_refused_in_one_line(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*words: object) -> str:
        return refused(capsys, "evaluate", trained.run, *CPU, "--context-gain", *words)

    assert "--context-gain=0 leaves no token" in told(0)
    assert "documents are read to 256 tokens. Use at most 254, or a greater --length" in told(255)
    assert "names 8 twice" in told(8, 16, 8)
    assert "--stride=0 is no step within documents of 256" in told(8, "--stride", 0)
    assert "--stride=257" in told(8, "--stride", 257)
    assert "--max-tokens=0 scores nothing" in told(8, "--max-tokens", 0)
    assert "finds no document of more tokens (the longest of unseen:" in told(
        5000, "--length", 9000
    )
    assert "--length=2 reads nothing beyond a context" in told(1, "--length", 2)
    assert "--beyond says nothing to context gain (--context-gain 8 given)" in told(8, "--beyond")
    line = refused(capsys, "evaluate", trained.run, *CPU, "--stride", 3)
    assert "--stride=3 says nothing to held-out loss" in line
    line = refused(capsys, "evaluate", trained.run, "needles", *CPU, "--context-gain")
    assert "--context-gain says nothing to a suite" in line


def test_a_run_file_that_asks_for_what_cannot_be_is_refused(trained: Trained) -> None:
    run = load(trained.folder / "run.yaml")

    def lines(*contexts: object) -> list[str]:
        asked = run.model_dump() | {"evaluate": {"context_gain": list(contexts)}}
        return problems(parse(RunConfig, asked), None)

    assert lines(16, "trained", 254) == []
    assert lines(255) == [
        "evaluate.context_gain names 255, beyond which there is no token: held-out documents are "
        "read to 256 tokens (4 times the longest of stages.lengths). Use at most 254."
    ]
    assert lines(16, 16) == ["evaluate.context_gain names 16 twice. Name each context once."]
    with pytest.raises(Exception, match="context_gain"):
        lines(0)
