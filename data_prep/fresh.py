"""New folders that appear whole: written beside their place and moved there at the end."""

import shutil
from collections.abc import Iterator
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
    if output.exists() and any(output.iterdir()):
        raise DataError(f"{output} is not empty. Name a new folder, or remove this one.")
    with scratch_folder(output.with_name(output.name + ".work")) as work:
        yield work
        if output.exists():
            output.rmdir()
        work.replace(output)
        sync_folder(output.parent)


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that is removed at the end, also one that a killed call has left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
