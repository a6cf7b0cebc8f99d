"""One process and one model at a time in a run directory."""

import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megahybrid.checkpoint.directory import RunLock, check_model
from megahybrid.errors import CheckpointError


def write_lock(run: Path, **changes: object) -> None:
    found = {"host": "elsewhere", "pid": 17, "process_start": "1", "token": "other"} | changes
    (run / "owner.lock").write_text(json.dumps(found))


def test_a_second_owner_is_refused_and_a_later_one_welcome(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        with (
            pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} on "),
            RunLock(tmp_path),
        ):
            pass
        assert (tmp_path / "owner.lock").exists(), "the refused one must not take the lock along"
    assert not (tmp_path / "owner.lock").exists()
    with RunLock(tmp_path) as owner:
        assert owner.took_over is None


def test_a_killed_owner_on_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    script = """
        import os, signal, sys
        from megahybrid.checkpoint.directory import RunLock
        with RunLock(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)])
    process.wait()
    assert (tmp_path / "owner.lock").exists()
    with RunLock(tmp_path) as owner:
        assert owner.took_over == f"process {process.pid} on {socket.gethostname()}"


def test_another_process_with_the_dead_owners_number_does_not_count(tmp_path: Path) -> None:
    write_lock(tmp_path, host=socket.gethostname(), pid=os.getpid(), process_start="0")
    with RunLock(tmp_path) as owner:
        assert owner.took_over is not None


def test_an_owner_on_another_machine_counts_until_its_lock_is_old(tmp_path: Path) -> None:
    write_lock(tmp_path)
    with (
        pytest.raises(CheckpointError, match="in use by process 17 on elsewhere"),
        RunLock(tmp_path),
    ):
        pass
    old = time.time() - 400
    os.utime(tmp_path / "owner.lock", (old, old))
    with RunLock(tmp_path) as owner:
        assert owner.took_over == "process 17 on elsewhere"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}'])
def test_a_lock_that_says_nothing_counts_until_it_is_old(tmp_path: Path, text: str) -> None:
    (tmp_path / "owner.lock").write_text(text)
    with pytest.raises(CheckpointError, match="in use by process"), RunLock(tmp_path):
        pass
    os.utime(tmp_path / "owner.lock", (0, 0))
    with RunLock(tmp_path):
        pass


def test_the_lock_is_renewed_while_the_owner_is_busy(tmp_path: Path) -> None:
    with RunLock(tmp_path, beat_seconds=0.05):
        os.utime(tmp_path / "owner.lock", (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / "owner.lock").stat().st_mtime < 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (tmp_path / "owner.lock").stat().st_mtime > 1


def test_an_owner_learns_that_it_was_replaced_and_leaves_the_new_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path, beat_seconds=0.05) as owner:
        owner.check()
        write_lock(tmp_path)
        with pytest.raises(CheckpointError, match="was taken over by process 17 on elsewhere"):
            for _ in range(200):
                owner.check()
                time.sleep(0.05)
    assert json.loads((tmp_path / "owner.lock").read_text())["token"] == "other"


def test_of_many_that_start_at_once_one_owns(tmp_path: Path) -> None:
    script = """
        import sys, time
        from megahybrid.checkpoint.directory import RunLock
        from megahybrid.errors import CheckpointError
        try:
            with RunLock(sys.argv[1]):
                print("owner", flush=True)
                sys.stdin.read()
        except CheckpointError:
            print("refused", flush=True)
    """
    write_lock(tmp_path, host=socket.gethostname())
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    answers = [process.stdout.readline().strip() for process in processes if process.stdout]
    for process in processes:
        process.communicate()
    assert sorted(answers) == ["owner", "refused", "refused", "refused"]


def test_a_directory_keeps_to_its_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    check_model(run, "8x128-a")
    check_model(run, "8x128-a")
    with pytest.raises(CheckpointError, match=r"another model \(8x128-a; this one is 8x256-b\)"):
        check_model(run, "8x256-b")
    (run / "model_fingerprint").write_bytes(b"\x80\x04\n\nno text")
    with pytest.raises(CheckpointError, match=r"another model \(.* no text; this one is 8x256-b\)"):
        check_model(run, "8x256-b")
