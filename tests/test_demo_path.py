"""The demo, smaller: the same commands and the same run file, from raw text to a report."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from megahybrid.cli import main
from megahybrid.ledger import read_ledger
from tests.events import named
from tests.train.forked import ROOT

DEMO = ROOT / "configs" / "runs" / "demo.yaml"
SMALLER = [
    "model.vocab_size=512",
    "model.layer_plan.num_layers=4",
    "model.layer_plan.schemes.local.window=32",
    "evaluate.max_tokens=8192",
    *(
        f"stages.{index}.{field}"
        for index, length in enumerate((64, 256, 1024))
        for field in (
            f"lengths={{{length}: 1}}",
            "tokens=20480",
            "batch_tokens=2048",
            "micro_batch_tokens=2048",
        )
    ),
    "stages.0.learning_rate.warmup_tokens=4096",
]


def say(*command: str) -> None:
    assert main(command) == 0, command


def test_from_raw_text_to_a_lengthened_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    text, model, data = "all.jsonl", "build/demo/tokenizer.model", "build/demo/data"
    say("data", "gather-stdlib", text)
    with open(text) as whole, open("some.jsonl", "w") as some:
        some.writelines(islice(whole, 150))
    say("data", "tokenizer", "some.jsonl", "--output", model, "--vocab-size", "512")
    say(
        *("data", "tokenize", "some.jsonl", "--tokenizer", model, "--output", data),
        *("--held-out", "0.05", "--longest", "2", "--workers", "1"),
    )
    say("data", "verify", f"{data}/train")
    say("check", str(DEMO), *SMALLER, "--world-size", "2")
    say("describe", str(DEMO), *SMALLER)

    done = subprocess.run(
        [sys.executable, "-m", "megahybrid", "train", str(DEMO), *SMALLER, "--processes", "2"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    run = Path("runs/demo")
    ledger = read_ledger(run / "ledger.jsonl")
    assert [line.stage for line in ledger.steps] == ["short"] * 10 + ["medium"] * 10 + ["long"] * 10
    losses = [line.loss or 0.0 for line in ledger.steps]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    scored = {
        (line.detail["set"], line.detail["stage"])
        for line in named(ledger, "evaluate")
        if line.detail["rows"] == "documents"
    }
    names = ("sample", "longest")
    assert scored == {(n, stage) for n in names for stage in ("short", "medium", "long")}
    last = named(ledger, "evaluate")[-1].detail
    assert last["by_position"][-1]["stop"] == 4 * 1024  # four times the longest, empty or not

    capsys.readouterr()
    say("evaluate", str(run), "--json")
    again = json.loads(capsys.readouterr().out)["scores"]
    by_run = {
        (line.detail["set"], line.detail["rows"]): line.detail["loss"]
        for line in named(ledger, "evaluate")
        if line.step == ledger.steps[-1].step
    }
    for score in again:
        assert score["loss"] == pytest.approx(by_run[score["set"], score["rows"]], rel=1e-5)

    say("sample", str(run), "--prompt", "def ", "--tokens", "20")
    assert capsys.readouterr().out.startswith("def ")
    say("report", str(run))
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert {".png", ".html"} <= {path.suffix for path in written}
    assert all(path.stat().st_size > 1000 for path in written)
