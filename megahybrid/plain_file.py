"""Small files that somebody names: read whole, and only where they are plain files with a size."""

import errno
import os
import stat
from pathlib import Path

from megahybrid.errors import PathError
from megahybrid.printable import shortened

_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def read_plain_file(path: str | Path, most_bytes: int) -> bytes:
    """Return the bytes of a plain file.

    A pipe would wait for a writer and a device may have no end, so neither is opened. Raises
    OSError, and PathError for what is no plain file or larger than `most_bytes`.
    """
    _check(path, os.stat(path), most_bytes)
    # Not waiting, for what was put in the file's place since.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        facts = os.fstat(file.fileno())
        _check(path, facts, most_bytes)
        return file.read(facts.st_size)


def _check(path: str | Path, facts: os.stat_result, most_bytes: int) -> None:
    name = shortened(str(path), 200)
    if stat.S_ISDIR(facts.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    for is_kind, words in _KINDS:
        if is_kind(facts.st_mode):
            raise PathError(f"{name} is {words}, not a plain file. Name a file.")
    if facts.st_size > most_bytes:
        raise PathError(
            f"{name} has {facts.st_size:,} bytes, more than the {most_bytes:,} that are read of "
            "such a file. Name another, or shorten it."
        )
