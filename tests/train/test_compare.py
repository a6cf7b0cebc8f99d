"""`megahybrid compare` of run files and of runs, and of branches however they were started."""

import json
from pathlib import Path
from typing import Any

import pytest

from megahybrid.cli import main
from megahybrid.config import load
from megahybrid.config.base import dump_yaml
from tests.train.example import RUN


def write_run(folder: Path, name: str, parent: dict[str, Any] | None = None, *more: str) -> None:
    """A run's directory as far as `compare` reads it: its config, and two attempts' beginnings."""
    (folder / "run.yaml").write_text(RUN)
    (folder / name).mkdir()
    run = load(folder / "run.yaml", [f"directory={name}", *more])
    (folder / name / "config.yaml").write_text(dump_yaml(run))
    detail = {"world_size": 1} | ({} if parent is None else {"parent": parent})
    lines = [
        {"kind": "event", "event": event, "attempt": n, "step": n, "stage": "short", "tokens": 0,
         "time_unix": 1.0, "detail": detail}
        for n, event in ((1, "start"), (2, "resume"))
    ]  # fmt: skip
    (folder / name / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("take", ["all", "weights"])
def test_a_branch_is_known_by_its_ledger_and_by_its_run_file(
    take: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, "trunk")
    checkpoint = str(tmp_path / "trunk/checkpoints/step-00000004")
    parent = {"checkpoint": checkpoint, "step": 4, "tokens": 4096, "take": take}
    write_run(tmp_path, "decay", parent, "stages.2.tokens=8192")
    taken = {"all": "weights, moments and data order", "weights": "weights alone"}[take]
    told = f"decay is a branch of trunk ({checkpoint}): step 4, 4,096 tokens; {taken}"
    for order in (["trunk", "decay"], ["decay", "trunk"]):
        assert main(["compare", *order]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == told
        assert any(line.split()[:1] == ["stages.2.tokens"] for line in lines)

    start = f"start: {{checkpoint: trunk/checkpoints/step-00000004, take: {take}}}\n"
    (tmp_path / "later.yaml").write_text(RUN + start)  # it has not begun
    assert main(["compare", "later.yaml", "trunk"]) == 0
    words = capsys.readouterr().out.splitlines()[0]
    assert words.startswith("later.yaml is a branch of trunk (trunk/checkpoints/step-00000004): ")
    assert main(["compare", "run.yaml", "run.yaml"]) == 0
    assert "branch" not in capsys.readouterr().out


def test_a_folder_that_is_no_run_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    assert main(["compare", str(tmp_path), str(tmp_path / "run.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "is a folder without a run's config.yaml" in error
