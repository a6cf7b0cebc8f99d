"""Which folders a run, a mean and a study may be written into."""

import shutil
from pathlib import Path

import pytest

from megahybrid.cli import main
from megahybrid.errors import ConfigError
from megahybrid.run_folder import refuse_foreign_run_folder, refuse_foreign_study_folder
from tests.train.example import RUN, write_data


def _made(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_text("x")
    return folder


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("logs/job.log", "slurm/job.json"),  # of a job that has not begun
        ("heartbeats/rank-0000.json", "config.yaml", ".owner.lock"),
        ("run.yaml", "notes.md", "slurm-17.out"),
        ("ledger.jsonl", "thesis.tex"),
        ("checkpoints/", "manifest.json"),
    ],
)
def test_a_run_may_be_in(names: tuple[str, ...], tmp_path: Path) -> None:
    refuse_foreign_run_folder(_made(tmp_path / "run", *names))


@pytest.mark.parametrize(
    ("names", "held"),
    [
        (("thesis.tex",), "thesis.tex"),
        (("thesis.tex", "logs/rank-0001.log"), "thesis.tex"),  # another rank was first
        (("manifest.json", "shard-00000.bin"), "a dataset or a checkpoint (manifest.json)"),
        (("manifest.json", "logs/rank-0001.log"), "a dataset or a checkpoint (manifest.json)"),
        (("config.json", "model.safetensors"), "a model (config.json)"),
        (("study.yaml", "run.yaml"), "a study (study.yaml)"),
        (("study.lock", "results/"), "a study's output (study.lock)"),
        (("a\x1b[2J\n",), "a\\x1b[2J\\n"),
    ],
)
def test_a_run_may_not_be_in(names: tuple[str, ...], held: str, tmp_path: Path) -> None:
    folder = _made(tmp_path / "run", *names)
    with pytest.raises(ConfigError) as refused:
        refuse_foreign_run_folder(folder)
    assert str(refused.value) == (
        f"directory={folder} holds {held}, which is not a run's. Name a new or empty folder, or a "
        "run's."
    )


def test_a_study_may_go_on_where_it_was_and_nowhere_else(tmp_path: Path) -> None:
    refuse_foreign_study_folder(_made(tmp_path / "new"))
    refuse_foreign_study_folder(_made(tmp_path / "old", "study.lock", "results/a.json", "hay/"))
    with pytest.raises(ConfigError, match="holds ledger.jsonl, which is not a study's output"):
        refuse_foreign_study_folder(_made(tmp_path / "run", "ledger.jsonl"))


@pytest.mark.parametrize("directory", ["books", "model", "study"])
def test_training_into_something_else_is_one_line_and_writes_nothing(
    directory: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_data(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN)
    _made(tmp_path, "model/config.json", "study/study.yaml")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", "run.yaml", f"directory={directory}"]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"megahybrid: directory={directory} holds a ") and line.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("verb", ["stop", "save", "cancel", "requeue", "tail", "nodes", "status"])
def test_a_request_to_a_folder_without_a_run_is_refused(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _made(tmp_path, "manifest.json", "thesis.tex")
    assert main(["launch", verb, str(tmp_path)]) == 2
    assert " holds no run (no ledger" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "thesis.tex"]


def test_a_run_killed_before_its_first_line_keeps_its_folder(tmp_path: Path) -> None:
    """What lies there then: all that a run writes but its ledger and its checkpoints."""
    kept = Path(__file__).parent / "version_0_1/files/run"
    shutil.copytree(kept, tmp_path / "run")
    (tmp_path / "run/ledger.jsonl").unlink()
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"model_fingerprint"}
    refuse_foreign_run_folder(tmp_path / "run")
    (tmp_path / "run/thesis.tex").touch()
    with pytest.raises(ConfigError, match="holds thesis.tex"):
        refuse_foreign_run_folder(tmp_path / "run")
