"""One place says the version, and what is written for keeps says which version wrote it."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest

import megahybrid
from megahybrid.cli import main

ROOT = Path(__file__).parents[2]
FILES = ROOT / "tests/version_0_1/files"
VERSION = megahybrid.__version__


def test_the_package_says_its_version_and_pyproject_reads_it_there() -> None:
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert told["project"]["dynamic"] == ["version"] and "version" not in told["project"]
    dynamic = told["tool"]["setuptools"]["dynamic"]
    assert dynamic["version"] == {"attr": "megahybrid.__version__"}
    assert f"## [{VERSION}]" in (ROOT / "CHANGELOG.md").read_text()


def test_a_plan_and_an_export_carry_the_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger and checkpoints: see the run that goes on in tests/version_0_1."""
    monkeypatch.chdir(shutil.copytree(FILES, tmp_path / "files"))
    assert main(["data", "pack", "books", "--length", "256", "--output", "again"]) == 0
    plan = json.loads(Path("again/plan.json").read_text())
    assert plan["command"].endswith(f"  # megahybrid {VERSION}")
    before = json.loads(Path("packed/plan.json").read_text())
    assert plan | {"command": ""} == before | {"command": ""}
    assert main(["data", "inspect", "again"]) == 0
    assert main(["export", "run", "out", "--architecture", "Megahybrid"]) == 0
    config = json.loads(Path("out/config.json").read_text())
    assert config["megahybrid_version"] == VERSION
