"""Two calls on one folder, and what a killed one leaves running."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megahybrid.data_prep.fresh import alone_in
from megahybrid.data_prep.pack import pack
from megahybrid.data_prep.rewrite import merge_datasets
from megahybrid.data_prep.tokenize import tokenize
from megahybrid.errors import DataError


def test_a_second_call_on_a_folder_is_refused(corpus: Path, model: Path, tmp_path: Path) -> None:
    tokenize([corpus], model, tmp_path / "books", quiet=True)
    data, new = tmp_path / "books/train", tmp_path / "new"
    work = tmp_path / "new.work"
    calls: list[tuple[Path, Callable[[], object]]] = [
        (new, lambda: tokenize([corpus], model, new, quiet=True)),
        (work, lambda: pack(data, new, 64)),
        (work, lambda: merge_datasets([data], new)),
    ]
    for place, call in calls:
        with alone_in(place):
            (place / "begun").write_text("by the first")
            with pytest.raises(DataError, match="is being written by another call"):
                call()
            assert (place / "begun").read_text() == "by the first"
            (place / "begun").unlink()
        assert not place.exists() and not new.exists()
    for _, call in calls:
        call()
        shutil.rmtree(new)


def children(of: int) -> list[int]:
    listed = Path(f"/proc/{of}/task/{of}/children").read_text().split()
    return [child for child in map(int, listed) if b"spawn_main" in command(child)]


def command(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_process_outlives_a_killed_call(model: Path, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"{n} " + "words " * 200}) + "\n" for n in range(20_000))
    (tmp_path / "a.jsonl").write_text(lines)
    words = ["data", "tokenize", tmp_path / "a.jsonl", "--tokenizer", model]
    words += ["--output", tmp_path / "new", "--workers", "2"]
    call = subprocess.Popen(
        [sys.executable, "-m", "megahybrid", *map(str, words)], stdout=subprocess.DEVNULL
    )
    end = time.monotonic() + 60
    while len(found := children(call.pid)) < 2 and time.monotonic() < end:
        assert call.poll() is None
        time.sleep(0.01)
    os.kill(call.pid, signal.SIGKILL)
    call.wait()
    assert len(found) == 2
    while any(map(command, found)) and time.monotonic() < end:
        time.sleep(0.05)
    left = [process for process in found if command(process)]
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert not left
