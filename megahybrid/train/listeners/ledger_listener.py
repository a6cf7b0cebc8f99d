"""Writes the run's ledger. Essential: a run whose record cannot be kept must stop."""

from pathlib import Path

from megahybrid.ledger import LEDGER_NAME, EventLine, StepLine
from megahybrid.train.ledger import LedgerWriter
from megahybrid.train.listeners.base import RunInfo


class LedgerListener:
    """Appends to `ledger.jsonl` in the run's directory, as a new attempt."""

    essential = True

    def __init__(self, directory: Path) -> None:
        self._writer = LedgerWriter(directory / LEDGER_NAME)

    @property
    def attempt(self) -> int:
        """This attempt's number, from 1."""
        return self._writer.attempt

    def on_start(self, run: RunInfo) -> None:
        """Write nothing: the event start or resume follows."""

    def on_step(self, line: StepLine) -> None:
        """Write a line."""
        self._writer.write(line)

    def on_event(self, line: EventLine) -> None:
        """Write a line, which is on disk when this returns."""
        self._writer.write(line)

    def on_end(self, outcome: str) -> None:
        """Closes the file."""
        self._writer.close()
