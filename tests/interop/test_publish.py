"""A folder appears whole or not at all, whatever ends the process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megahybrid.errors import InteropError
from megahybrid.interop.publish import published

pytest.importorskip("transformers", reason="an export is run by transformers")

HALF = """
import sys, pathlib
from megahybrid.interop.publish import published
with published(pathlib.Path(sys.argv[1]), 0) as folder:
    (folder / "half").write_text("x")
    print(folder.name, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writer(tmp_path: Path) -> subprocess.Popen[str]:
    """A process in the midst of writing `out`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HALF, str(tmp_path / "out")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2], env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline().startswith(".out-")
    return process


def test_what_a_killed_process_left_is_deleted_and_told(
    writer: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "is being written by another process"
    with pytest.raises(InteropError, match=words), published(tmp_path / "out", 0):
        pass
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    (left,) = tmp_path.iterdir()
    assert not (tmp_path / "out").exists()
    (tmp_path / ".outer-01234567.tmp").mkdir()  # another's
    with published(tmp_path / "out", 0) as folder:
        (folder / "whole").write_text("x")
    assert f"deleted {left}, which a process that was killed had left" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [".outer-01234567.tmp", "out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), published(tmp_path / "deep/out", 0) as folder:
        (folder / "half").write_text("x")
        raise ZeroDivisionError
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    words = "GiB that are needed. Free some."
    with pytest.raises(InteropError, match=words), published(tmp_path / "out", 2**60):
        pass
    assert list(tmp_path.iterdir()) == []
