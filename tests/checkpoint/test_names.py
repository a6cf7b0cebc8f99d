"""A folder of `RUN/checkpoints` holds the step that it is named after, or it counts for nothing."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megahybrid import cli
from megahybrid.checkpoint.folders import Retention, apply_retention
from megahybrid.checkpoint.latest import latest
from megahybrid.checkpoint.manifest import read_manifest
from megahybrid.checkpoint.names import name_fault
from megahybrid.checkpoint.reader import Reader, verify
from megahybrid.errors import CheckpointError
from megahybrid.launch.records import newest_checkpoint
from megahybrid.train.restore import checkpoint_of
from tests.checkpoint.examples import save_plain
from tests.checkpoint.test_damage import rewrite


def link(source: Path, target: Path) -> None:
    target.symlink_to(source.name)


WAYS: dict[str, Callable[[Path, Path], object]] = {
    "copied": shutil.copytree,
    "renamed": os.rename,
    "linked": link,
}
WORDS = "it holds step 171, not the step 999 that it is named after. Rename it to step-00000171"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (168, 170, 171):
        save_plain(tmp_path / "run", step)
    return tmp_path / "run"


def misname(run: Path, way: str = "copied", name: str = "step-00000999") -> Path:
    folder = run / "checkpoints" / name
    WAYS[way](run / "checkpoints" / "step-00000171", folder)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_a_folder_of_another_step_is_passed_over_and_named(way: str, run: Path) -> None:
    folder = misname(run, way)
    newest = run / "checkpoints" / ("step-00000170" if way == "renamed" else "step-00000171")
    told: list[str] = []
    assert latest(run, told.append) == newest == checkpoint_of(run)
    assert len(told) == 1 and f"{folder}: {WORDS}" in told[0]
    for way_in in (verify, Reader, read_manifest):
        with pytest.raises(CheckpointError, match=WORDS):
            way_in(folder)
    assert newest_checkpoint(run) == int(newest.name[-3:])


def test_the_real_ones_stay_and_so_does_the_one_of_another_name(run: Path) -> None:
    """Newer or older, it takes no real one's place and is not ours to delete."""
    for name in ("step-00000999", "step-00000001", "step-0000000171"):
        misname(run, name=name)
    assert apply_retention(run, Retention(keep_last=2)) == ["step-00000168"]
    assert save_plain(run, 172, keep_last=2) == latest(run, lambda line: None)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-00000001", "step-0000000171", "step-00000171", "step-00000172", "step-00000999",
    ]  # fmt: skip


def test_every_command_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = misname(run)

    def call(*words: object) -> tuple[int, str, str]:
        code = cli.main(["checkpoint", *map(str, words)])
        told = capsys.readouterr()
        return code, told.out, told.err

    rows = json.loads(call("list", run, "--json")[1])
    assert [WORDS in (row["problem"] or "") for row in rows] == [True, False, False, False]
    for words in (("verify", run), ("verify", folder), ("show", folder), ("diff", folder, run)):
        code, _, err = call(*words)
        assert code == 2 and WORDS in err.splitlines()[0], words
    code, out, err = call("show", run)
    assert code == 0 and "step:        171" in out and f"Passing over {folder}: {WORDS}" in err
    code, out, _ = call("diff", run, run / "checkpoints" / "step-00000171")
    assert code == 0 and out.startswith("0 of 3")
    assert call("average", run, "--out", run.parent / "mean")[0] == 0
    assert latest(run.parent / "mean") == run.parent / "mean/checkpoints/step-00000171"


def test_a_run_of_misnamed_folders_alone_does_not_begin_anew(run: Path) -> None:
    for step in (168, 170, 171):
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.rename(folder.with_name(f"step-{step + 1000:08d}"))
    with pytest.raises(CheckpointError, match="none of its 3 checkpoints can be read"):
        latest(run, lambda line: None)


def test_a_copy_elsewhere_may_have_any_name(run: Path, tmp_path: Path) -> None:
    for name in ("step-00000999", "best", "kept/step-00000001"):
        shutil.copytree(run / "checkpoints" / "step-00000171", tmp_path / name)
        assert verify(tmp_path / name).step == 171
        assert checkpoint_of(tmp_path / name) == tmp_path / name


def test_a_name_counts_however_the_folder_is_reached(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = misname(run)
    monkeypatch.chdir(folder)
    for way in (Path("."), Path("../step-00000999"), Path("../../checkpoints/step-00000999")):
        with pytest.raises(CheckpointError, match="it holds step 171"):
            verify(way)
    assert name_fault(run / "checkpoints" / ".step-00000171.replaced", 171) is None
    assert name_fault(run / "checkpoints" / ".step-00000172.replaced", 171) is not None


@pytest.mark.parametrize("field", ["step", "tokens"])
@pytest.mark.parametrize("value", [5, -5, "x", None, 171.0, True])
def test_a_train_state_of_another_step_is_damage(field: str, value: object, run: Path) -> None:
    newest = run / "checkpoints" / "step-00000171"
    rewrite(newest, lambda values: values["train_state"].update({field: value}))
    told: list[str] = []
    assert latest(run, told.append) == run / "checkpoints" / "step-00000170"
    assert f"train_state.{field}=" in told[0] and "\n" not in told[0]
