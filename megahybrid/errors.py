"""Errors that a user can cause or meet, and the exit code each one ends the process with.

Every message is one line:
`<dotted name>=<value> <what is wrong> (<the other number>). <What to do>.`
"""

import errno
import os
import re
import sys
import traceback
from typing import TextIO

from megahybrid.printable import printable, shortened

EXIT_DONE = 0
EXIT_USER_MISTAKE = 2
EXIT_STORAGE = 74  # EX_IOERR
EXIT_RESUME = 75
EXIT_DO_NOT_RESTART = 93


def first_line(error: BaseException) -> str:
    """The first line of what an error says; "" where it says nothing."""
    return (str(error).splitlines() or [""])[0]


# A path of thousands of characters hides what is wrong with it.
_LONG_WORD = re.compile(r"\S{250,}")


def tell(message: str, terminal: TextIO | None = None) -> None:
    """Write what ended a process to `terminal` (stderr), our name before each line.

    What a message quotes of a file or a name cannot steer the terminal.
    """
    for line in message.split("\n"):
        words = _LONG_WORD.sub(lambda found: shortened(found[0], 200), printable(line))
        print(f"megahybrid: {words}", file=terminal or sys.stderr, flush=True)


class MegahybridError(Exception):
    """Base of every error that is reported without a traceback: each argument is one line."""

    exit_code = EXIT_USER_MISTAKE
    system_errno: int | None = None  # what the operating system refused, where that is the cause

    def __str__(self) -> str:
        # A line end within a line is one of a name or a value that it quotes.
        return "\n".join(printable(str(line)) for line in self.args)

    def because(self, cause: OSError | int | None) -> "MegahybridError":
        """Return this error with the exit code of the refusal (or its errno) that caused it.

        Words of its own must not turn storage that fails into a user's mistake, which nobody tries
        again.
        """
        self.system_errno = cause.errno if isinstance(cause, OSError) else cause
        if self.system_errno in _STORAGE:
            self.exit_code = EXIT_STORAGE
        return self

    def in_training(self) -> "MegahybridError":
        """Return this error, met after an attempt's first step.

        No path is the user's mistake then.
        """
        if self.system_errno in _TYPED and self.exit_code == EXIT_USER_MISTAKE:
            self.exit_code = EXIT_STORAGE
        return self


class ConfigError(MegahybridError):
    """A run file that cannot be meant: unknown keys, impossible values, parts that disagree."""


class DataError(MegahybridError):
    """A dataset or tokenizer that is missing, damaged, foreign or not the one the run needs."""


class CheckpointError(MegahybridError):
    """A checkpoint that is missing, damaged or of another model."""


class InteropError(MegahybridError):
    """A model cannot be exported or imported as it is, or computes another function there."""


class StorageError(MegahybridError):
    """Storage failed beneath us: no space, a quota, a disk or file system that fails.

    Nothing that was there is lost, and another attempt may do better.
    """

    exit_code = EXIT_STORAGE


class PathError(MegahybridError):
    """A path that somebody typed: it is missing, not readable, no folder, too long."""


class MeshError(MegahybridError):
    """Ranks that cannot form the mesh: missing variables, a taken port, degrees that do not fit."""


class RendezvousError(MeshError):
    """Ranks did not find one another: a node that died or a port left over.

    Another attempt may do better.
    """

    exit_code = 69  # EX_UNAVAILABLE


class AuditError(MegahybridError):
    """The engine's arithmetic was proven wrong while running: do not restart, look first."""

    exit_code = EXIT_DO_NOT_RESTART


class NoProgressError(MegahybridError):
    """The run cannot go on by itself, for example after too many skipped updates in a row."""

    exit_code = EXIT_DO_NOT_RESTART


class RepeatError(MegahybridError):
    """A resume came to other data than an earlier attempt had at the same step: do not restart."""

    exit_code = EXIT_DO_NOT_RESTART


class ExhaustedError(NoProgressError):
    """The data have come to their end.

    Training saves and ends as done where the run file says data.exhausted=stop.
    """


class GateError(MegahybridError):
    """A model did not reach at a stage's end what the run file asks of it.

    Another attempt would not either.
    """

    exit_code = EXIT_DO_NOT_RESTART


# What a wrong path gives, until a run has begun; and what storage itself gives, at any time.
_TYPED = frozenset(
    (
        errno.ENOENT,
        errno.EACCES,
        errno.EPERM,
        errno.ENAMETOOLONG,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
        errno.EINVAL,
        errno.EEXIST,
        errno.ENOTEMPTY,
        errno.ENXIO,
        errno.ENODEV,
    )
)
_STORAGE = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
)


def from_os_error(error: OSError, *, began: bool = False) -> MegahybridError | None:
    """Return the one-line error for what the operating system refused.

    None where it is neither a path nor storage (a refused connection, too many open files).

    `began`: the run has taken its first step, so its paths were right once and no path is the
    user's mistake any more (exit code 74 in place of 2).
    """
    if error.errno not in _TYPED | _STORAGE:
        return None
    path = "a file" if error.filename is None else _named(error.filename)
    reason = error.strerror or os.strerror(error.errno)
    if error.errno in _STORAGE or began:
        return StorageError(
            f"{path} could not be read or written ({reason}). Nothing that was saved is lost. "
            "Make room or mend the file system, then give the same command again."
        )
    return PathError(f"{path} cannot be used ({reason}). Name a path that can be.")


def _named(filename: object) -> str:
    """A path as an OSError has it (text, bytes, or the number of an open file), on one line."""
    if isinstance(filename, int):
        return "an open file"
    text = os.fsdecode(filename) if isinstance(filename, bytes | os.PathLike) else str(filename)
    return shortened(text, 200)


def from_exception(error: Exception) -> MegahybridError | None:
    """Return the one-line error for what input alone can cause and nobody refused before.

    That is paths and storage, a path that is none, text that is no UTF-8, nesting without end,
    memory that does not suffice. None for everything else: that is our own fault, and a traceback
    says where.
    """
    match error:
        case OSError():
            return from_os_error(error)
        case UnicodeEncodeError() if any("\ud800" <= letter <= "\udfff" for letter in error.object):
            return PathError(
                f"'{shortened(error.object)}' is not UTF-8 text (character {error.start}). "
                "Write it in UTF-8."
            )
        case UnicodeDecodeError():
            return DataError(
                f"a file that was named is not {error.encoding.upper()} text (byte {error.start}: "
                f"{error.reason}). Name a text file, or save it as UTF-8."
            )
        case ValueError() if "embedded null" in str(error):
            return PathError("a path that was named holds a NUL character. Leave it out.")
        case RuntimeError() if str(error).startswith("Symlink loop"):  # pathlib's, in Python < 3.13
            return PathError(f"{shortened(first_line(error), 200)}. Name a path that can be.")
        case RecursionError() if _while_parsing(error):
            return DataError("a file that was named is nested too deeply. Flatten it.")
        case MemoryError():
            return ConfigError(
                "there is not enough memory "
                f"({shortened(first_line(error) or 'MemoryError', 200)}). "
                "Ask for less, or use a machine with more."
            )
        case _:
            return None


_PARSERS = ("json", "ruamel", "pydantic", "megahybrid.config.yaml_file")


def _while_parsing(error: RecursionError) -> bool:
    """Return whether a parser ran into the limit: any other endless recursion is our own fault."""
    modules = {
        str(frame.f_globals.get("__name__", ""))
        for frame, _ in traceback.walk_tb(error.__traceback__)
    }
    return any(
        name == known or name.startswith(f"{known}.") for name in modules for known in _PARSERS
    )


def raise_in_training(error: BaseException) -> None:
    """Raise what an attempt met after its first step as failing storage.

    Every path had once been right then. Returns where it is neither a path nor storage.
    """
    if isinstance(error, MegahybridError):
        raise error.in_training()
    known = from_os_error(error, began=True) if isinstance(error, OSError) else None
    if known is not None:
        raise known from error
