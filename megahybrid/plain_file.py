"""Small files that somebody names: read whole, and only where they are plain files with a size."""

import errno
import os
import stat
from pathlib import Path

from megahybrid.errors import PathError
from megahybrid.printable import shortened

_SPECIAL_FILES = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def read_plain_file(path: str | Path, most_bytes: int = 2**30) -> bytes:
    """Return the bytes of a plain file.

    A pipe would wait for a writer and a device may have no end, so neither is opened. Raises
    OSError, and PathError for what is not a plain file or larger than `most_bytes`.
    """
    _check(path, os.stat(path), most_bytes)
    # Not waiting, for what was put in the file's place since.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        facts = os.fstat(file.fileno())
        _check(path, facts, most_bytes)
        return file.read(facts.st_size)


def refuse_other_than_file(path: str | Path, option: str) -> None:
    """Raise PathError where a pipe, a socket or a folder stands in place of a file to be written.

    Opening a pipe waits for a reader that may never come. A device such as /dev/null may be meant.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # whoever opens it tells
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISDIR(mode):
        name = shortened(str(path), 200)
        raise PathError(f"{option}={name} exists and is not a file. Name a file.")


def _check(path: str | Path, facts: os.stat_result, most_bytes: int) -> None:
    name = shortened(str(path), 200)
    if stat.S_ISDIR(facts.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    for is_special, what in _SPECIAL_FILES:
        if is_special(facts.st_mode):
            raise PathError(f"{name} is {what}, not a plain file. Name a file.")
    if facts.st_size > most_bytes:
        raise PathError(
            f"{name} has {facts.st_size:,} bytes, more than the {most_bytes:,} that are read of "
            "such a file. Name another, or shorten it."
        )
