"""New folders that appear whole: written beside their place and moved there at the end."""

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
    """Raises DataError unless `folder` can become a new folder of ours: it is not there, or is an
    empty folder but for the names in `ours`."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        kind = "a link to nothing" if folder.is_symlink() else "a file"
        raise DataError(f"{folder} is {kind}, not a folder. Name a new folder.")
    if any(entry.name not in ours for entry in folder.iterdir()):
        raise DataError(f"{folder} is not empty. Name a new folder, or remove this one.")


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that is removed at the end, also one that a killed call has left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
