"""Reading the ledger: what a run did, one JSON object a line, only ever appended to.

It is the truth about a run; plots, trackers and resumes read it. A line is complete when it ends in
a newline.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megahybrid.errors import MegahybridError
from megahybrid.ledger.lines import EventLine, Line, StepLine, parse

LEDGER_NAME = "ledger.jsonl"
E = TypeVar("E")


@dataclass(frozen=True)
class Ledger:
    """The lines of a run that still hold, in the order they were written."""

    lines: tuple[Line, ...]

    @property
    def steps(self) -> list[StepLine]:
        """The step lines."""
        return [line for line in self.lines if isinstance(line, StepLine)]

    @property
    def events(self) -> list[EventLine]:
        """All event lines."""
        return [line for line in self.lines if isinstance(line, EventLine)]

    def of(self, *kinds: type[E]) -> list[tuple[EventLine, E]]:
        """The events of some kinds, each with its line."""
        return [(line, line.content) for line in self.events if isinstance(line.content, kinds)]


def read_ledger(path: Path) -> Ledger:
    """Read the lines of a ledger, without what a resume made void.

    Lines of earlier attempts beyond the step of a later start or resume are dropped, and all lines
    beyond the step of a later rewind. A torn last line is ignored; a torn line elsewhere raises
    MegahybridError with its number.
    """
    kept: list[Line] = []
    for line in read_every_line(path):
        if isinstance(line, EventLine) and line.begins:
            kept = [old for old in kept if old.attempt >= line.attempt or old.step <= line.step]
        elif isinstance(line, EventLine) and line.goes_back:
            kept = [old for old in kept if old.step <= line.step]
        kept.append(line)
    return Ledger(tuple(kept))


def read_every_line(path: Path) -> Iterator[Line]:
    """Every complete line of a ledger, of all attempts, in the order they were written."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MegahybridError(
            f"{path} could not be read ({error.strerror}). Name the directory of a run."
        ).because(error) from error
    texts = content.split(b"\n")
    # The piece after the last newline is empty, or a line that was never finished.
    for number, text in enumerate(texts[:-1], start=1):
        try:
            yield parse(text)
        except (ValueError, TypeError, RecursionError) as error:
            if number == len(texts) - 1 and not texts[-1]:
                return
            raise MegahybridError(
                f"{path}:{number} is not a ledger line ({error}). "
                "Only the last line may be torn; restore the file or remove this line."
            ) from error


def newest_lines(path: Path, nbytes: int = 1 << 20) -> Iterator[Line]:
    """The lines at the end of a ledger that somebody writes meanwhile, the newest first; none where
    it cannot be read. What is no line is passed over."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - nbytes))
            texts = file.read().split(b"\n")[:-1]
    except OSError:
        return
    for text in reversed(texts):
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            yield parse(text)
