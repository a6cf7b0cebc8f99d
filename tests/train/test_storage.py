"""Storage that fails ends a run with one line and 74, which may be tried again; a wrong path that
somebody typed with 2. The disk is really full: no file of a rank grows beyond a limit (EFBIG), or
the run lies on a small file system of its own (ENOSPC)."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megahybrid.checkpoint import durable
from megahybrid.checkpoint.latest import latest
from megahybrid.data.shard_files import ShardFiles
from megahybrid.data.token_file import ShardIndex
from megahybrid.errors import (
    EXIT_STORAGE,
    EXIT_USER_MISTAKE,
    CheckpointError,
    DataError,
    MegahybridError,
    StorageError,
    raise_in_training,
)
from megahybrid.ledger import LEDGER_NAME, read_ledger
from tests.checkpoint.examples import save_plain
from tests.events import named
from tests.train.example import steps_of, steps_so_far
from tests.train.forked import Nursery, Ranks

TRAIN = ["train", "run.yaml", "directory=run"]


def last_words(ranks: Ranks) -> str:
    assert "Traceback" not in ranks.text(), ranks.text()
    return ranks.last_line()


@pytest.fixture
def small_disk(example: Path) -> Iterator[Path]:
    """`run` of the example, on a file system of 12 MiB."""
    folder = example / "run"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """A file that takes all but `leave` bytes of a file system."""
    ballast = folder / "ballast.txt"  # a note, which a run suffers in its folder
    free = shutil.disk_usage(folder).free
    ballast.write_bytes(bytes(max(0, free - leave)))
    return ballast


@pytest.mark.parametrize("world", [1, 2])
def test_a_save_without_room_is_told_and_a_stages_end_is_74(
    world: int, nursery: Nursery, example: Path
) -> None:
    """Step 3's save fails and the run goes on; the one at step 4, a stage's end, it needs."""
    full = Ranks(nursery, TRAIN, world, example, file_bytes=90_000)
    assert full.wait() == [EXIT_STORAGE] * world, full.text()
    assert last_words(full).startswith("megahybrid: directory=run could not take the checkpoint of")
    ledger = read_ledger(example / "run" / LEDGER_NAME)
    assert [s.detail["saved_step"] for s in named(ledger, "save")] == [3, 4]
    assert not any(s.detail["ok"] for s in named(ledger, "save"))
    assert "File too large" in named(ledger, "save")[0].detail["error"]
    assert [s.step for s in ledger.steps] == [1, 2, 3, 4]
    after = Ranks(nursery, TRAIN, world, example)
    assert after.wait() == [0] * world, after.text()


def test_no_room_for_the_ledger_is_74(nursery: Nursery, example: Path) -> None:
    full = Ranks(nursery, TRAIN, 1, example, file_bytes=4000)
    assert full.wait() == [EXIT_STORAGE], full.text()
    assert last_words(full).startswith("megahybrid: run/ledger.jsonl could not be written (File")
    assert read_ledger(example / "run" / LEDGER_NAME).lines


def test_no_room_for_the_config_is_74_and_keeps_the_one_there_was(
    nursery: Nursery, example: Path
) -> None:
    first = Ranks(nursery, TRAIN, 1, example, fault="slow_steps")
    assert first.until(lambda: steps_so_far(example / "run") >= 2)
    first.send(signal.SIGTERM)
    assert first.wait() == [75], first.text()
    before = (example / "run/config.yaml").read_bytes()
    full = Ranks(nursery, TRAIN, 1, example, file_bytes=1000)
    assert full.wait() == [EXIT_STORAGE], full.text()
    assert "config.yaml could not be read or written (File too large)" in last_words(full)
    assert (example / "run/config.yaml").read_bytes() == before
    assert not list((example / "run").glob(".config*"))


def test_a_disk_full_from_the_start_is_74(nursery: Nursery, small_disk: Path) -> None:
    fill(small_disk, 0)
    full = Ranks(nursery, TRAIN, 1, small_disk.parent)
    assert full.wait() == [EXIT_STORAGE], full.text()
    assert "No space left on device" in last_words(full)


def test_a_disk_that_gets_full_is_74_and_nothing_is_lost(
    nursery: Nursery, small_disk: Path
) -> None:
    """All that was saved and told stays, and the same command goes on once there is room."""
    ranks = Ranks(nursery, TRAIN, 2, small_disk.parent, fault="slow_steps_on_a_small_disk")
    assert ranks.until(lambda: (small_disk / "checkpoints/step-00000004").exists()), ranks.text()
    ballast = fill(small_disk, 4096)
    assert ranks.wait()[0] == EXIT_STORAGE, ranks.text()
    last_words(ranks)
    newest = latest(small_disk)
    assert newest is not None and newest.name >= "step-00000004"
    assert steps_of(small_disk)[-1].step >= 4
    ballast.unlink()
    after = Ranks(nursery, TRAIN, 2, small_disk.parent, fault="slow_steps_on_a_small_disk")
    assert after.wait() == [0, 0], after.text()


def test_a_log_without_room_is_dropped_and_told(nursery: Nursery, example: Path) -> None:
    """The console's file is not the truth about a run: the run goes on without it."""
    (example / "run/logs").mkdir(parents=True)
    (example / "run/logs/rank-0000.log").symlink_to("/dev/full")
    ranks = Ranks(nursery, TRAIN, 1, example)
    assert ranks.wait() == [0], ranks.text()
    told = named(read_ledger(example / "run" / LEDGER_NAME), "listener_failed")
    assert [line.detail["listener"] for line in told] == ["Console"]
    assert "No space left on device" in told[0].detail["reason"]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("a_data_file_that_fails", "shard-00000.bin cannot be read (Input/output error)"),
        ("a_data_file_that_vanishes", "shard-00000.bin cannot be read (No such file or directory)"),
        ("a_run_folder_that_vanishes", "directory=run is gone"),
    ],
)
def test_what_fails_beneath_a_run_that_trains_is_74(
    fault: str, words: str, nursery: Nursery, example: Path
) -> None:
    ranks = Ranks(nursery, TRAIN, 2, example, fault=fault)
    assert ranks.wait()[0] == EXIT_STORAGE, ranks.text()
    assert words in last_words(ranks)


def test_a_path_that_somebody_typed_is_2(nursery: Nursery, example: Path) -> None:
    for change in ("data.sources.books.path=nowhere", "directory=run.yaml/run"):
        ranks = Ranks(nursery, [*TRAIN, change], 1, example)
        assert ranks.wait() == [EXIT_USER_MISTAKE], ranks.text()
        last_words(ranks)


STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
TYPED = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR,
         errno.ELOOP, errno.EINVAL)  # fmt: skip


@pytest.mark.parametrize("number", [*STORAGE, *TYPED])
def test_words_of_our_own_keep_the_class_of_a_failure(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    expected = EXIT_STORAGE if number in STORAGE else EXIT_USER_MISTAKE
    run = save_plain(tmp_path, 1).parents[1]
    monkeypatch.setattr(durable, "damaged_blocks", refuse)
    with pytest.raises(CheckpointError) as none_whole:
        latest(run, lambda line: None)
    assert none_whole.value.exit_code == expected
    monkeypatch.setattr(os, "preadv", refuse)
    (run / LEDGER_NAME).write_text("")
    shard = ShardIndex(run / LEDGER_NAME, run / LEDGER_NAME, np.dtype("<u2"), 0, 0, 0)
    with pytest.raises(DataError) as unread:
        ShardFiles([shard]).read_into(0, 0, np.zeros(4, np.uint8))
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(MegahybridError) as ledger:
        read_ledger(run / LEDGER_NAME)
    for error in (unread.value, ledger.value):
        assert error.exit_code == expected
        with pytest.raises(type(error)) as again:
            raise_in_training(error)
        assert again.value.exit_code == EXIT_STORAGE


def test_in_training_every_refusal_of_a_path_is_storage_and_no_other_error_changes() -> None:
    for number in (*STORAGE, *TYPED):
        with pytest.raises(StorageError, match="here could not be"):
            raise_in_training(OSError(number, os.strerror(number), "here"))
    raise_in_training(OSError(errno.EMFILE, "Too many open files"))
    raise_in_training(ZeroDivisionError())
    with pytest.raises(DataError) as same:
        raise_in_training(DataError("books: on purpose."))
    assert same.value.exit_code == EXIT_USER_MISTAKE


def test_74_is_started_again_and_counts(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    handlers: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three starts are two of --max-restarts; the code of the last comes back."""
    from megahybrid.commands.local_restarts import train_local

    body = "import sys; open('tries', 'a').write('x'); sys.exit(74)"
    monkeypatch.chdir(tmp_path)
    assert train_local(["-c", body], 1, tmp_path / "run", max_restarts=2) == EXIT_STORAGE
    assert (tmp_path / "tries").read_text() == "xxx"
    assert capsys.readouterr().err.count("starting again") == 2
    body = "import os, sys; sys.exit(74 if os.path.getsize('tries') == 3 and not "
    body += "open('tries', 'a').write('x') else 0)"
    assert train_local(["-c", body], 1, tmp_path / "run", max_restarts=1) == 0


def test_printing_to_a_full_disk_does_not_change_the_code() -> None:
    code = (
        "import sys\n"
        "from megahybrid.commands.train import _flush\n"
        "print('x' * 10); _flush(); sys.exit(74)\n"
    )
    with open("/dev/full", "w") as full:
        buffered = os.environ | {"PYTHONUNBUFFERED": ""}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=buffered)
    assert done.returncode == EXIT_STORAGE, done.stderr
