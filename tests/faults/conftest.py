"""The example run of tests/train, and the run that nobody disturbed."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.example import write_example

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_example(folder)
    return folder


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    """After each test: no process that works in its folder, no lock, no half-written file."""
    yield
    deadline = time.monotonic() + 20
    while left := _processes_in(tmp_path):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    assert not list(tmp_path.rglob("owner.lock"))
    assert not [path for path in tmp_path.rglob("*.tmp") if "checkpoints" not in path.parts]


def _processes_in(folder: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            here = str(folder) in words or (path / "cwd").readlink().is_relative_to(folder)
            if here and int(path.name) != os.getpid():
                found.append(f"{path.name}: {words}")
    return found


@pytest.fixture
def example(prepared: Path, tmp_path: Path) -> Path:
    """A folder of this test's own with data and run.yaml."""
    for name in ("books", "code", "held"):
        shutil.copytree(prepared / name, tmp_path / name)
    shutil.copy(prepared / "run.yaml", tmp_path / "run.yaml")
    return tmp_path


@pytest.fixture(scope="session")
def undisturbed(prepared: Path) -> Path:
    """The same run in two ranks, from its start to its end."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "megahybrid", "train", "run.yaml", "--processes", "2"),
            *("directory=undisturbed", "parallel.tensor=2"),
        ],
        cwd=prepared,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return prepared / "undisturbed"


def environment() -> dict[str, str]:
    """Of a command run in another folder."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
