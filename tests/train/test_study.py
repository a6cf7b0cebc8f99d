"""A study runs what is missing of its grid, once, and tabulates what counts."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megahybrid.config import load
from megahybrid.config.study import Study
from megahybrid.config.suite import Suite
from megahybrid.data.dataset import TokenDataset
from megahybrid.errors import ConfigError
from megahybrid.train import study_command
from megahybrid.train.study_command import study, tabulate

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
STUDIES = sorted(path.parent for path in EXPERIMENTS.glob("*/study.yaml"))


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_every_variant_of_a_shipped_study_is_a_run_that_can_be_meant(folder: Path) -> None:
    plan = load(folder / "study.yaml", type=Study)
    suite = load(folder / plan.suite, type=Suite)
    plans = []
    for overrides in plan.variants.values():
        run = load(folder / plan.run, overrides)
        run.check(1)
        plans.append(run.model)
        assert set(run.data.sources) == set(plan.data)
        assert run.model.vocab_size >= plan.ids[1]
    assert all(one != other for n, one in enumerate(plans) for other in plans[:n])
    if plan.gate is not None:
        assert plan.gate.length in suite.tasks[plan.gate.task].lengths


@pytest.fixture
def small(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    shutil.copytree(EXPERIMENTS / "length_extrapolation", folder)
    text = (folder / "study.yaml").read_text()
    (folder / "study.yaml").write_text(text.replace("0_000}", "}"))
    return folder


def test_study_trains_and_scores_what_has_no_result_yet(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[list[str]] = []

    def pretend(command: list[str], **_: Any) -> Any:
        told.append(command[3:])
        if command[3] == "train":
            return SimpleNamespace(returncode=1 if "rope-seed2" in command[-3] else 0)
        rows = [{"length": length, "token_accuracy": 0.96} for length in (32, 512)]
        return SimpleNamespace(
            returncode=0, stdout=json.dumps({"tasks": {"recall": {"by_length": rows}}})
        )

    monkeypatch.setattr(
        study_command, "subprocess", SimpleNamespace(run=pretend, PIPE=-1, DEVNULL=-3)
    )
    out = tmp_path / "out"
    names = {"variants": ["rnope_swa", "rope"], "seeds": [1, 2]}
    assert study(small, out=out, **names) == 1  # type: ignore[arg-type]
    assert [one[0] for one in told] == ["train", "evaluate"] * 3 + ["train"]
    assert "seed=2" in told[-1] and f"directory={out}/runs/rope-seed2" in told[-1]
    assert f"data.sources.t16.path={out}/data/t16" in told[0]
    data = TokenDataset(out / "data" / "t16")
    assert (data.documents, data.tokens) == (6, 6 * 17)
    kept = sorted(path.stem for path in (out / "results").glob("*.json"))
    assert kept == ["rnope_swa-seed1", "rnope_swa-seed2", "rope-seed1"]
    told.clear()
    study(small, out=out, **names)  # type: ignore[arg-type]
    assert [one[0] for one in told] == ["train"]  # only the one that failed
    assert "2 of 2" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--variants=alibi is not one of"):
        study(small, out=out, variants=["alibi"])


def test_runs_below_the_gate_are_counted_apart() -> None:
    plan = load(EXPERIMENTS / "length_extrapolation" / "study.yaml", type=Study)

    def result(seed: int, near: float, far: float) -> dict[str, Any]:
        rows = [{"length": 32, "token_accuracy": near}, {"length": 4096, "token_accuracy": far}]
        return {"variant": "rope", "seed": seed, "tasks": {"recall": {"by_length": rows}}}

    found = [result(1, 1.0, 0.2), result(2, 0.9, 0.8), result(3, 0.95, 0.1), result(4, 1.0, 0.6)]
    row = next(row for row in tabulate(plan, found) if row["variant"] == "rope")
    assert (row["runs"], row["counted"]) == (4, 3)
    assert row["scores"][1] == {
        "task": "recall", "length": 4096, "median": 0.2, "least": 0.1, "most": 0.6
    }  # fmt: skip
