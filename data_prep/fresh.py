"""New folders that appear whole: written beside their place and moved there at the end."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from megahybrid.data.manifest import sync_folder
from megahybrid.errors import DataError


@contextmanager
def fresh_folder(output: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `output` when nothing was raised.

    What a killed call left behind is taken away by the next, which begins anew. Raises DataError
    when `output` holds anything.
    """
    refuse_occupied(output)
    with scratch_folder(output.with_name(output.name + ".work")) as work:
        yield work
        if output.exists():
            output.rmdir()
        work.replace(output)
        sync_folder(output.parent)


def refuse_occupied(folder: Path, ours: Collection[str] = ()) -> None:
    """Raise DataError unless `folder` can become a new folder of ours.

    It can where it is not there, or is an empty folder but for the names in `ours`.
    """
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        what = "a link to nothing" if folder.is_symlink() else "a file"
        raise DataError(f"{folder} is {what}, not a folder. Name a new folder.")
    if any(entry.name not in ours for entry in folder.iterdir()):
        raise DataError(f"{folder} is not empty. Name a new folder, or remove this one.")


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that is removed at the end, also one that a killed call has left."""
    with alone_in(folder):
        for entry in folder.iterdir():
            entry.unlink() if entry.is_symlink() or not entry.is_dir() else shutil.rmtree(entry)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other calls out of a folder while the block runs.

    The folder is made where it is not there and does not stay where it is empty. Two calls that
    write the same names would each publish what the other has begun. The system lets go of it
    however the process ends. Raises DataError where another call has it.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        refuse_occupied(folder)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{folder} is being written by another call. Wait for it, or name another folder."
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)
        if made:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()
