"""Files that a run names are looked for by `check`, and data beside the run file are found."""

import importlib.util
from pathlib import Path

import pytest

from megahybrid.cli import main
from megahybrid.config import load
from megahybrid.config.files import missing_files
from tests.config.example import example
from tests.train.example import RUN


def test_each_missing_file_and_package_has_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = example(
        "evaluate.suites={a: {path: nowhere.yaml}, b: {path: configs/suites/needles.yaml}}",
        "start={checkpoint: runs/gone}",
        "log={tensorboard: true, wandb: offline}",
        "kernels={norm: apex}",
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    lines = missing_files(run)
    assert [line.split(" ")[0] for line in lines] == [
        "data",
        "evaluate.suites.a.path=nowhere.yaml",
        "start.checkpoint=runs/gone",
        "log.tensorboard=true",
        "log.wandb=offline",
        "kernels.norm=apex",
    ]
    assert all(line.endswith(".") and "\n" not in line for line in lines)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert len(missing_files(run)) == 3


def test_check_fails_for_missing_files_unless_told_not_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RUN)
    assert main(["check", "run.yaml"]) == 2
    told = capsys.readouterr()
    assert "parameters" in told.out and "data not here" in told.err and "--no-files" in told.err
    assert main(["check", "run.yaml", "--no-files"]) == 0
    assert not capsys.readouterr().err


def test_data_that_lie_beside_the_run_file_are_found_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/data").mkdir(parents=True)
    text = RUN + "\n"
    (tmp_path / "mine/run.yaml").write_text(text)
    name = "data.sources.stdlib" if "stdlib" in text else "data.sources.text"
    told: list[str] = []
    found = load("mine/run.yaml", [f"{name}={{path: data}}"], tell=told.append)
    source = found.data.sources[name.rpartition(".")[2]]
    assert source.path == "mine/data"
    assert told == [f"{name}.path=data is not here, but beside the run file: mine/data."]
    (tmp_path / "data").mkdir()
    told.clear()
    here = load("mine/run.yaml", [f"{name}={{path: data}}"], tell=told.append)
    assert here.data.sources[name.rpartition(".")[2]].path == "data" and told == []
