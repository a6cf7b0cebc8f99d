"""Errors that a user can cause or meet, and the exit code each one ends the process with.

Every message is one line:
`<dotted name>=<value> <what is wrong> (<the other number>). <What to do>.`
"""

import sys
from typing import TextIO

EXIT_DONE = 0
EXIT_USER_MISTAKE = 2
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


class ConfigError(MegahybridError):
    """A run file that cannot be meant: unknown keys, impossible values, parts that disagree."""


class DataError(MegahybridError):
    """A dataset or tokenizer that is missing, damaged, foreign or not the one the run needs."""


class CheckpointError(MegahybridError):
    """A checkpoint that is missing, damaged or of another model."""


class InteropError(MegahybridError):
    """A model that cannot leave or enter as it is, or that came out another function."""


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


class ExhaustedError(NoProgressError):
    """The data have come to their end. Training saves and ends as done where the run file says
    data.exhausted=stop."""


class GateError(MegahybridError):
    """A model did not reach at a stage's end what the run file asks of it: another attempt would
    not either."""

    exit_code = EXIT_DO_NOT_RESTART
