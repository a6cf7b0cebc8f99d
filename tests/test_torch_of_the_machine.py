"""`make install TORCH=system` takes the torch that PYTHON has, whatever kind of Python that is."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TORCH = "__version__ = '2.11.0+stub'\n"
METADATA = "Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0+stub\n"


def put_torch(folder: Path) -> None:
    """A torch that says its version."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch/__init__.py").write_text(TORCH)
    (folder / "torch-2.11.0.dist-info").mkdir()
    (folder / "torch-2.11.0.dist-info/METADATA").write_text(METADATA)


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """An environment without packages; its site-packages."""
    command = [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "its own")]
    subprocess.run(command, check=True)
    return next((tmp_path / "its own/lib").glob("python3.*/site-packages"))


def install(parent: Path) -> subprocess.CompletedProcess[str]:
    """The first part of `make install`, up to where torch is known."""
    folder = parent.parents[3]
    python = folder / "link"  # make's PYTHON has no spaces
    if not python.exists():
        python.symlink_to(parent.parents[2])
    told = [f"PYTHON={python}/bin/python", "TORCH=system", f"VENV={folder}/new"]
    return subprocess.run(
        ["make", "--no-print-directory", *told, f"{folder}/new/constraints.txt"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=250,
    )


@pytest.mark.parametrize("behind", [False, True], ids=["in it", "behind a line of its own"])
def test_a_venv_made_from_a_venv_sees_that_one_s_torch(parent: Path, behind: bool) -> None:
    place = parent
    if behind:
        place = parent.parents[3] / "elsewhere"
        (parent / "more.pth").write_text(f"{place}\n")
    put_torch(place)
    (parent / "both.py").write_text("of = 'the parent'\n")
    done = install(parent)
    assert done.returncode == 0, done.stderr
    new = parent.parents[3] / "new"
    assert (new / "constraints.txt").read_text().startswith("torch==2.11.0+stub\n")
    # What is installed here goes before.
    own = next((new / "lib").glob("python3.*/site-packages"))
    (own / "both.py").write_text("of = 'its own'\n")
    asked = [str(new / "bin/python"), "-c", "import torch, both; print(torch.__file__, both.of)"]
    said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    assert said.strip().endswith(" its own")
    assert install(parent).returncode == 0  # a second time


def test_a_python_without_torch_is_one_line(parent: Path) -> None:
    done = install(parent)
    assert done.returncode == 2
    assert "TORCH=system, but PYTHON=" in done.stderr and "has no torch" in done.stderr
