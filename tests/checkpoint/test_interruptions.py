"""A save that is stopped anywhere leaves the run with a checkpoint it can resume from."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megahybrid.checkpoint import durable, names, writer
from megahybrid.checkpoint.fragments import STATES, whole
from megahybrid.checkpoint.latest import latest
from megahybrid.checkpoint.rank_file import RankFile
from megahybrid.checkpoint.reader import Reader
from megahybrid.checkpoint.writer import save
from tests.checkpoint.examples import SHAPES, save_plain, save_together, snapshot, values

CALLS = ("mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir")


class Killed(BaseException):
    """Stands for a kill: nothing in the code may catch it."""


def stop_at(
    monkeypatch: pytest.MonkeyPatch, point: int, error: Callable[[], BaseException]
) -> list:
    """Raise at the `point`-th change of the file system, after it if odd and before it if even."""
    seen: list[str] = []

    def wrap(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            before = len(seen)
            seen.extend((f"before {name}", f"after {name}"))
            if before == point:
                raise error()
            try:
                return real(*args, **kwargs)
            finally:
                if before + 1 == point:
                    raise error()

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(name))
    return seen


def content_is_of_its_step(path: Path) -> bool:
    with Reader(path) as reader:
        return all(
            reader.read(name, state, whole(shape)).tobytes()
            == values(name, state, shape, reader.manifest.step).tobytes()
            for name, shape in SHAPES.items()
            for state in STATES
        )


def points_of_a_save(tmp_path: Path, step: int) -> int:
    """How many points there are to stop at in a save of `step` to a copy of tmp_path/begun.

    It holds the checkpoint of step 1, which the save deletes or replaces.
    """
    save_plain(tmp_path / "begun", 1)
    run = shutil.copytree(tmp_path / "begun", tmp_path / "counted")
    with pytest.MonkeyPatch.context() as patch:
        seen = stop_at(patch, -1, Killed)
        save_plain(run, step, keep_last=1)
    return len(seen)


@pytest.mark.parametrize("step", [2, 1], ids=["next_step", "same_step_again"])
def test_a_kill_at_any_point_leaves_a_checkpoint_to_resume(tmp_path: Path, step: int) -> None:
    points = points_of_a_save(tmp_path, step)
    assert points >= 2 * 12
    published_from = None
    for point in range(points):
        run = shutil.copytree(tmp_path / "begun", tmp_path / f"run-{point}")
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, point, Killed)
            with pytest.raises(Killed):
                save_plain(run, step, keep_last=1)
        found = latest(run)
        assert found is not None and content_is_of_its_step(found), point
        if found == names.published_path(run, 2):
            published_from = published_from or point
        else:
            assert published_from is None, "once published, a later kill takes nothing back"
        # The next save clears up, and is not hindered.
        assert save_plain(run, 3, keep_last=1) == latest(run)
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003"]
    assert step == 1 or published_from


def test_a_failing_disk_at_any_point_fails_the_save_and_not_the_run(tmp_path: Path) -> None:
    points = points_of_a_save(tmp_path, 2)
    failed = 0
    for point in range(0, points, 2):
        run = shutil.copytree(tmp_path / "begun", tmp_path / f"run-{point}")
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, point, lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            result = save(run, snapshot(2), keep_last=1)
        found = latest(run)
        assert found is not None and content_is_of_its_step(found)
        if not result.ok:
            failed += 1
            assert result.error == "rank 0: No space left on device"
        else:
            assert found == result.path
        assert save_plain(run, 3, keep_last=1) == latest(run)
    assert failed >= 12


def test_one_ranks_full_disk_is_every_ranks_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = save_plain(tmp_path, 1)
    real = durable.write

    def full(path: Path, chunks: Any) -> Any:
        if path.name == "fragments-0001.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, chunks)

    monkeypatch.setattr(durable, "write", full)
    parts = snapshot(2).fragments
    results = save_together(tmp_path, [snapshot(2, parts[rank::2]) for rank in range(2)])
    assert {result.error for result in results} == {results[0].error}
    assert "rank 1: No space left on device" in str(results[0].error)
    assert latest(tmp_path) == before
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_too_little_space_is_seen_before_a_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_plain(tmp_path, 1)
    usage = type("Usage", (), {"free": 2**20})()
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(durable, "write", lambda *args: pytest.fail("a byte was written"))
    result = save(tmp_path, snapshot(2), keep_last=1)
    assert not result.ok
    assert "has 0.00 GiB free, less than the 0.03 GiB that the save needs" in str(result.error)


def test_what_reads_back_differently_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = save_plain(tmp_path, 1)
    real = durable.damaged_blocks

    def decay(path: Path, record: Any) -> list[int]:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return real(path, record)

    monkeypatch.setattr(durable, "damaged_blocks", decay)
    result = save(tmp_path, snapshot(2), keep_last=1)
    assert "block 0 of fragments-0000.safetensors reads back differently" in str(result.error)
    # The same step once more: the one that stood there stands there again.
    assert not save(tmp_path, snapshot(1), keep_last=1).ok
    monkeypatch.undo()
    assert latest(tmp_path) == before
    assert [path.name for path in before.parent.iterdir()] == [before.name]


def test_a_file_that_rank_0_cannot_see_fails_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "VISIBLE_WITHIN_SECONDS", 0.2)
    real = RankFile.write

    def elsewhere(self: Any, folder: Path) -> Any:
        record = real(self, folder)
        if self.name == "fragments-0001.safetensors":
            (folder / self.name).unlink()
        return record

    monkeypatch.setattr(RankFile, "write", elsewhere)
    parts = snapshot(1).fragments
    results = save_together(tmp_path, [snapshot(1, parts[rank::2]) for rank in range(2)])
    assert "fragments-0001.safetensors was written by its rank but" in str(results[1].error)
    assert latest(tmp_path) is None


def test_a_process_killed_while_saving_leaves_a_checkpoint(tmp_path: Path) -> None:
    """The same with a real SIGKILL, at moments that the clock chooses."""
    script = """
        import sys
        from pathlib import Path
        from tests.checkpoint.examples import save_plain
        step = int(sys.argv[2])
        while True:
            save_plain(Path(sys.argv[1]), step, keep_last=2)
            print(step, flush=True)
            step += 1
    """
    step = 1
    for moment in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), str(step)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        printed = [int(process.stdout.readline()) for _ in range(3)]
        time.sleep(0.007 * moment)
        process.send_signal(signal.SIGKILL)
        printed += [int(line) for line in process.stdout.read().split()]
        process.wait()
        process.stdout.close()
        found = latest(tmp_path)
        assert found is not None and content_is_of_its_step(found)
        with Reader(found) as reader:
            step = reader.manifest.step
        assert step in (printed[-1], printed[-1] + 1)
        step += 1
