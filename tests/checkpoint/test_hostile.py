"""Random damage anywhere, and files that want to run code: nothing is believed, nothing runs."""

import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megahybrid.checkpoint.folders import Retention, apply_retention, remove_leftovers
from megahybrid.checkpoint.latest import latest
from megahybrid.checkpoint.reader import Reader, verify
from megahybrid.commands.checkpoint import chosen
from megahybrid.config import load
from megahybrid.config.training import StartConfig
from megahybrid.errors import CheckpointError, MegahybridError
from megahybrid.train.restore import check_beginning, checkpoint_of
from tests.checkpoint.examples import save_plain, save_together, snapshot
from tests.checkpoint.test_interruptions import content_is_of_its_step


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of steps 1 and 2, of two ranks."""
    run = tmp_path_factory.mktemp("good")
    for step in (1, 2):
        parts = snapshot(step).fragments
        save_together(run, [snapshot(step, parts[rank::2]) for rank in range(2)])
    return run


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_damage_to_the_newest_falls_back_to_the_one_before(
    data: st.DataObject, good: Path
) -> None:
    """One to four flips, cuts, removals, swaps, copies or appended bytes, at random places."""
    with tempfile.TemporaryDirectory() as folder:
        run = shutil.copytree(good, Path(folder) / "run")
        newest = run / "checkpoints" / "step-00000002"
        before = {path.name: path.read_bytes() for path in newest.iterdir()}
        for _ in range(data.draw(st.integers(1, 4))):
            files = sorted(newest.iterdir())
            if files:
                _damage(data, data.draw(st.sampled_from(files)), files)
        told: list[str] = []
        found = latest(run, told.append)
        after = {path.name: path.read_bytes() for path in newest.iterdir()}
        assert found is not None and content_is_of_its_step(found)
        if after == before:  # two flips of one bit
            assert found == newest
        else:
            assert found.name == "step-00000001"
            (line,) = told
            assert line.startswith(f"Passing over {newest}") and "\n" not in line


def _damage(data: st.DataObject, path: Path, files: list[Path]) -> None:
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "remove", "swap", "copy", "append", "zero"]))
    at = data.draw(st.integers(0, max(0, len(content) - 1)))
    if kind == "remove":
        path.unlink()
    elif kind == "swap":
        other = data.draw(st.sampled_from(files))
        mine, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(mine)
    elif kind == "copy":
        path.with_name("fragments-0009.safetensors").write_bytes(content)
    elif content:
        if kind == "flip":
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at:]
        elif kind == "append":
            content += b"\0"
        else:
            content[at : at + 8] = bytes(len(content[at : at + 8]))
        path.write_bytes(content)


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def pickled(canary: Path) -> bytes:
    return pickle.dumps({"model": Canary(canary)})


def torch_zip(canary: Path, folder: Path) -> bytes:
    """As torch.save writes: a zip archive with a pickle inside."""
    with zipfile.ZipFile(folder / "made.zip", "w") as archive:
        archive.writestr("archive/data.pkl", pickled(canary))
        archive.writestr("archive/version", "3")
    return (folder / "made.zip").read_bytes()


FOREIGN = ("mp_rank_00_model_states.pt", "latest", ".metadata", "pytorch_model.bin", "data.pkl")


@pytest.mark.parametrize("kind", ["pickle", "torch_zip"])
def test_no_way_in_runs_what_a_file_holds(kind: str, tmp_path: Path) -> None:
    """Planted as every file a checkpoint has, and under the names other formats look for."""
    canary, run = tmp_path / "canary", tmp_path / "run"
    evil = pickled(canary) if kind == "pickle" else torch_zip(canary, tmp_path)
    for step in (1, 2, 3, 4):
        save_plain(run, step)
    folders = [run / "checkpoints" / f"step-0000000{step}" for step in (1, 2, 3, 4)]
    (folders[0] / "manifest.json").write_bytes(evil)
    (folders[1] / "fragments-0000.safetensors").write_bytes(evil)
    for name in FOREIGN:
        for folder in (run, run / "checkpoints", *folders):
            (folder / name).write_bytes(evil)
    for name in ("owner.lock", "model_fingerprint", "ledger.jsonl"):
        (run / name).write_bytes(evil)
    size = (folders[2] / "fragments-0000.safetensors").stat().st_size
    (folders[2] / "fragments-0000.safetensors").write_bytes(evil[:size].ljust(size, b"\0"))
    ways: list[Callable[[], Any]] = [
        lambda: latest(run, lambda line: None),
        lambda: apply_retention(run, Retention(1)),
        lambda: remove_leftovers(run),
        lambda: checkpoint_of(run),
        lambda: chosen(run),
    ]
    for folder in folders:
        ways += [
            lambda folder=folder: verify(folder),
            lambda folder=folder: checkpoint_of(folder),
            lambda folder=folder: Reader(folder).read("final_norm.weight", "weight", ((0, 4),)),
        ]
    for way in ways:
        with suppress(MegahybridError, FileNotFoundError):
            way()
        assert not canary.exists()
    assert pickle.loads(pickled(canary)) and canary.exists(), "the canary sings when it is let"


def test_a_start_that_is_a_pickle_is_refused(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    run = load(Path(__file__).parents[2] / "configs/runs/demo.yaml", [])
    for name in ("model.pt", "folder/manifest.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickled(canary))
        start = path if path.suffix == ".pt" else path.parent
        branch = run.model_copy(update={"start": StartConfig(checkpoint=str(start))})
        with pytest.raises(CheckpointError):
            check_beginning(branch, tmp_path / "run")
        assert not canary.exists()


def test_no_source_of_the_load_path_can_unpickle() -> None:
    """Nothing in these folders names a loader that runs what it reads."""
    package = Path(verify.__code__.co_filename).parents[1]
    for folder in ("checkpoint", "train", "evaluate", "interop", "data"):
        for path in (package / folder).rglob("*.py"):
            text = path.read_text()
            for word in ("import pickle", "torch.load(", "allow_pickle=True", "joblib", "marshal"):
                assert word not in text, f"{path}: {word}"


def test_a_second_job_on_the_directory_is_refused(tmp_path: Path) -> None:
    from megahybrid.checkpoint.directory import RunLock

    script = (
        "import sys, time\n"
        "from megahybrid.checkpoint.directory import RunLock\n"
        "with RunLock(sys.argv[1]):\n"
        "    print('mine', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "mine\n"
        with pytest.raises(CheckpointError, match=f"is in use by process {process.pid} on"):
            RunLock(tmp_path).__enter__()
        process.kill()
        process.wait()
    with RunLock(tmp_path) as owner:
        assert owner.took_over == f"process {process.pid} on {socket.gethostname()}"
