"""A torch built for CUDA is kept by its version; where none can be had, a line says why."""

import os
import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
VERSION = re.search(r'^TORCH = "(.*)"', (ROOT / ".ci/cuda-torch").read_text(), re.MULTILINE)[1]  # type: ignore[index]


def ask(folder: Path) -> subprocess.CompletedProcess[str]:
    """`.ci/cuda-torch` where pip knows the wheels of `folder` alone."""
    environment = {name: v for name, v in os.environ.items() if not name.startswith("PIP_")}
    environment |= {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1"}
    environment |= {"PIP_FIND_LINKS": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, str(ROOT / ".ci/cuda-torch")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def put_torch(folder: Path, cuda: str | None) -> Path:
    """A wheel of a torch that says what it was built for."""
    path = folder / f"torch-{VERSION}-py3-none-any.whl"
    info = f"torch-{VERSION}.dist-info"
    said = f"from torch import version\n__version__ = '{VERSION}'\n"
    with ZipFile(path, "w") as archive:
        archive.writestr("torch/__init__.py", said)
        archive.writestr("torch/version.py", f"cuda = {cuda!r}\n")
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {VERSION}\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(autouse=True)
def room(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    if free < 16 * 2**30:
        pytest.skip("this disk has no room for a torch that is built for CUDA")


def test_it_is_made_once_and_kept(tmp_path: Path) -> None:
    wheel = put_torch(tmp_path, "13.0")
    first = ask(tmp_path)
    place = Path(first.stdout.strip())
    assert first.returncode == 0 and not first.stderr, first.stderr
    assert place.parent == tmp_path / "cache/megahybrid" and VERSION in place.name
    assert (place / "torch/version.py").exists()
    wheel.unlink()
    assert ask(tmp_path).stdout == first.stdout
    assert [path.name for path in place.parent.iterdir()] == [place.name]


@pytest.mark.parametrize("built", [False, True], ids=["no torch", "one for the CPU"])
def test_where_there_is_none_a_line_says_why(tmp_path: Path, built: bool) -> None:
    if built:
        put_torch(tmp_path, None)
    found = ask(tmp_path)
    assert found.returncode == 1 and not found.stdout
    assert found.stderr.count("\n") == 1, found.stderr
    why = "built without CUDA" if built else "No matching distribution"
    assert found.stderr.startswith(f"torch {VERSION} with CUDA cannot be had: ")
    assert why in found.stderr
    assert list((tmp_path / "cache/megahybrid").iterdir()) == []
