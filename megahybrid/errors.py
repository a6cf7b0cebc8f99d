"""Errors that a user can cause or meet, and the exit code each one ends the process with.

Every message is one line:
`<dotted name>=<value> <what is wrong> (<the other number>). <What to do>.`
"""

import errno
import os
import sys
from typing import TextIO

EXIT_DONE = 0
EXIT_USER_MISTAKE = 2
EXIT_STORAGE = 74  # EX_IOERR
EXIT_RESUME = 75
EXIT_DO_NOT_RESTART = 93


def first_line(error: BaseException) -> str:
    """The first line of what an error says; "" where it says nothing."""
    return (str(error).splitlines() or [""])[0]


def tell(message: str, terminal: TextIO | None = None) -> None:
    """Writes what ended a process to `terminal` (stderr), our name before each line."""
    for line in message.splitlines():
        print(f"megahybrid: {line}", file=terminal or sys.stderr, flush=True)


class MegahybridError(Exception):
    """Base of every error that is reported as one line without a traceback."""

    exit_code = EXIT_USER_MISTAKE
    system_errno: int | None = None  # what the operating system refused, where that is the cause

    def because(self, cause: OSError | int | None) -> "MegahybridError":
        """This error, with the exit code of the refusal (or its errno) that caused it: words of its
        own must not turn storage that fails into a user's mistake, which nobody tries again."""
        self.system_errno = cause.errno if isinstance(cause, OSError) else cause
        if self.system_errno in _STORAGE:
            self.exit_code = EXIT_STORAGE
        return self

    def in_training(self) -> "MegahybridError":
        """This error, met after an attempt's first step: no path is the user's mistake then."""
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
    """A model that cannot leave or enter as it is, or that came out another function."""


class StorageError(MegahybridError):
    """Storage failed beneath us: no space, a quota, a disk or file system that fails. Nothing that
    was there is lost, and another attempt may do better."""

    exit_code = EXIT_STORAGE


class PathError(MegahybridError):
    """A path that somebody typed: it is missing, not readable, no folder, too long."""


class MeshError(MegahybridError):
    """Ranks that cannot form the mesh: missing variables, a taken port, degrees that do not fit."""


class RendezvousError(MeshError):
    """Ranks that did not find one another: a node that died or a port left over. Another attempt
    may do better."""

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
    """The data have come to their end. Training saves and ends as done where the run file says
    data.exhausted=stop."""


class GateError(MegahybridError):
    """A model did not reach at a stage's end what the run file asks of it: another attempt would
    not either."""

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
    )
)
_STORAGE = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
)


def from_os_error(error: OSError, *, began: bool = False) -> MegahybridError | None:
    """Return the one-line error for what the operating system refused, or None where it is neither
    a path nor storage (a refused connection, too many open files).

    `began`: the run has taken its first step, so its paths were right once and no path is the
    user's mistake any more (exit code 74 in place of 2).
    """
    if error.errno not in _TYPED | _STORAGE:
        return None
    path = error.filename if error.filename is not None else "a file"
    reason = error.strerror or os.strerror(error.errno)
    if error.errno in _STORAGE or began:
        return StorageError(
            f"{path} could not be read or written ({reason}). Nothing that was saved is lost. "
            "Make room or mend the file system, then give the same command again."
        )
    return PathError(f"{path} cannot be used ({reason}). Name a path that can be.")


def raise_in_training(error: BaseException) -> None:
    """Raise what an attempt met after its first step, when every path had once been right, as
    failing storage; return where it is neither a path nor storage."""
    if isinstance(error, MegahybridError):
        raise error.in_training()
    known = from_os_error(error, began=True) if isinstance(error, OSError) else None
    if known is not None:
        raise known from error
