"""The example run of tests/train, and the run that nobody disturbed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.example import write_example

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_example(folder)
    return folder


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
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
