"""A folder that appears whole or not at all, and what a killed process left of one."""

import fcntl
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megahybrid.checkpoint import durable
from megahybrid.errors import InteropError

SPARE_BYTES = 64 * 2**20


@contextmanager
def published(out: Path, needed_bytes: int) -> Iterator[Path]:
    """A folder to fill that becomes `out` when the block ends well, and else is gone.

    The leftover of a killed process at the same place is deleted, and printed. Raises InteropError
    where `out` exists, is being written by another process, or cannot be written."""
    if out.exists() or out.is_symlink():
        raise InteropError(f"{out} exists. Name another folder, or remove it.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _clear(out)
        free = shutil.disk_usage(out.parent).free
        if free < needed_bytes + SPARE_BYTES:
            raise InteropError(
                f"{out.parent} has {free / 2**30:.2f} GiB free, less than the "
                f"{(needed_bytes + SPARE_BYTES) / 2**30:.2f} GiB that are needed. Free some."
            )
        folder = out.parent / f".{out.name}-{uuid.uuid4().hex[:8]}.tmp"
        folder.mkdir()
        held = _hold(folder)
    except OSError as error:
        raise InteropError(f"{out} cannot be written ({error.strerror}).") from None
    try:
        yield folder
        durable.sync_directory(folder)
        durable.rename(folder, out)
    except OSError as error:
        raise InteropError(f"{out} cannot be written ({error.strerror or error}).") from None
    finally:
        durable.remove(folder)
        forget_copied_code(folder)
        if held is not None:
            os.close(held)


def _clear(out: Path) -> None:
    """Delete what killed processes left of `out`. Raises InteropError where one still writes."""
    for left in out.parent.glob(f".{glob.escape(out.name)}-{'[0-9a-f]' * 8}.tmp"):
        try:
            held = _hold(left)
        except BlockingIOError:
            raise InteropError(
                f"{out} is being written by another process ({left.name}). Wait for it, or name "
                "another folder."
            ) from None
        except FileNotFoundError:
            continue  # it was published, or given up, just now
        if held is None:
            print(f"{left} may be left of a process that was killed; delete it when none writes")
            continue
        durable.remove(left)
        forget_copied_code(left)
        os.close(held)
        print(f"deleted {left}, which a process that was killed had left")


def _hold(folder: Path) -> int | None:
    """Return an open handle that shows others, until it is closed, that this process lives; None on
    a file system without locks. Raises BlockingIOError where another process holds it."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        os.close(handle)
        return None
    return handle


def forget_copied_code(folder: Path) -> None:
    """Delete transformers' copy of the code of a folder that is about to lose its name."""
    from transformers.utils import HF_MODULES_CACHE

    # The folder's random letters are in the copy's name as well.
    for path in Path(HF_MODULES_CACHE, "transformers_modules").glob(f"*{folder.stem[-8:]}*"):
        durable.remove(path)
