"""The paths that a `megahybrid data` command was given, looked at before it reads or writes.

A pipe would be waited for, a device read without end, and a place that cannot be written noticed
after the work: each is one line here. What only the command can judge is left to it.
"""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megahybrid.errors import DataError
from megahybrid.printable import shortened

READ = ("inputs", "path", "paths", "run_directory", "other", "tokenizer", "against")
WRITTEN = ("output", "prefix", "picture")
OPTIONS = ("tokenizer", "against", "output", "picture")
STDIN = ("-", "/dev/stdin")  # as an input
FILES = ("gather-stdlib", "tokenizer")  # commands whose output is a file
OPEN_FILE = re.compile(r"/dev/fd/\d+|/proc/(self|\d+)/fd/\d+")
LONGEST_SUFFIX = ".bin.runs.tmp"  # at most this is put behind a name while it is written


def check_paths(command: str, given: Mapping[str, Any]) -> None:
    """Raises DataError or OSError where a path that was given cannot be meant."""
    for name, text in _given(given, READ):
        _check_text(name, text)
        if not (name == "inputs" and (text in STDIN or text.startswith("hf:"))):
            _check_read(name, text)
    for name, text in _given(given, WRITTEN):
        _check_text(name, text)
        _check_written(name, text, command in FILES or name == "picture")
    if (pattern := given.get("glob")) is not None:
        _check_pattern(pattern)


def _given(given: Mapping[str, Any], names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for name in names:
        value = given.get(name)
        for text in value if isinstance(value, list) else [value]:
            if text is not None:
                yield name, text


def _shown(name: str, text: str) -> str:
    shown = shortened(text)
    return f"--{name}={shown}" if name in OPTIONS else f"{name}={shown}"


def _check_text(name: str, text: str) -> None:
    if not text:
        raise DataError(f"{_shown(name, text)} is empty. Name a path.")
    if "\0" in text:
        raise DataError(f"{_shown(name, text)} holds a NUL character. Name a path without.")


def _check_read(name: str, text: str) -> None:
    try:
        mode = os.stat(text).st_mode
    except FileNotFoundError:
        return  # a glob, a prefix, or missing: the command says what it has looked for
    if name == "inputs" and is_kernels(text):
        raise DataError(f"{_shown(name, text)} is the kernel's, no text on a disk. Name another.")
    if stat.S_ISDIR(mode):
        os.scandir(text).close()
    elif stat.S_ISREG(mode):
        open(text, "rb").close()
    elif not (name == "inputs" and stat.S_ISFIFO(mode) and is_open_file(text)):
        raise DataError(
            f"{_shown(name, text)} is neither a file nor a folder ({_file_type(mode)}). Name one."
        )


def is_open_file(given: str | Path) -> bool:
    """Return whether this names a file that the process has open.

    A pipe of `<(command)` is one: it has a writer.
    """
    return given in STDIN or OPEN_FILE.fullmatch(os.path.abspath(given)) is not None


def is_kernels(given: str | Path) -> bool:
    """Return whether the kernel makes this file up when it is read.

    Such a file has no size, and may never end.
    """
    real = os.path.realpath(given) + "/"
    return real.startswith(("/proc/", "/sys/")) and not is_open_file(given)


def _check_written(name: str, text: str, is_file: bool) -> None:
    path = Path(text)
    if not path.name:
        raise DataError(f"{_shown(name, text)} has no name of its own. Name a new one.")
    try:
        mode = os.stat(text).st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    if mode is not None and not stat.S_ISREG(mode) and (is_file or not stat.S_ISDIR(mode)):
        raise DataError(
            f"{_shown(name, text)} is there already ({_file_type(mode)}). Name a new one."
        )
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(path.with_name(path.name + LONGEST_SUFFIX))
    parent = next(place for place in path.absolute().parents if place.exists())
    if not parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(parent))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(parent))


def _check_pattern(pattern: str) -> None:
    try:
        next(Path(os.devnull).glob(pattern), None)
    except (ValueError, NotImplementedError, IndexError):
        raise DataError(
            f"--glob={pattern!r} is not a pattern of names within a folder. Write one like "
            "'**/*.jsonl'."
        ) from None


def _file_type(mode: int) -> str:
    for test, file_type in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    ):
        if test(mode):
            return file_type
    return "a file"


def check_picture(name: str | None) -> None:
    """Raises DataError where a picture could not be written as it was asked for."""
    if name is None:
        return
    path = Path(name)
    if path.suffix.lower() != ".svg":
        raise DataError(
            f"--picture={name} is not an .svg, the only format that pictures are drawn in. Name a "
            "file that ends in .svg."
        )
    if not path.parent.is_dir():
        raise DataError(
            f"--picture={name} lies in {path.parent}, which is not a folder. Name a file in one "
            "that exists."
        )
