"""How far an evaluation of minutes is: a bar on a terminal, a line a minute elsewhere."""

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 60.0  # between the lines of a log


class EvaluationProgress:
    """Tells on stderr what share of `total` tokens is done, and the time left at the same speed.

    A context manager. Evaluations of less than a minute write nothing to a log.
    """

    def __init__(
        self,
        what: str,
        total: int,
        *,
        console: Console | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.total = what, max(1, total)
        self.console = console or Console(stderr=True, highlight=False)
        self._now = now
        self._done = 0
        self._started = self._told = now()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task(what, total=self.total)

    def __enter__(self) -> "EvaluationProgress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def say(self, what: str) -> None:
        """Name what is being done now."""
        self.what = what
        self._bar.update(self._task, description=what)

    def advance(self, tokens: int) -> None:
        """Count tokens that were scored since the last call."""
        self._done = min(self.total, self._done + tokens)
        self._bar.update(self._task, completed=self._done)
        now = self._now()
        due = now - self._told >= PLAIN_SECONDS and 0 < self._done < self.total
        if self.console.is_terminal or not due:
            return
        self._told = now
        left = (now - self._started) * (self.total - self._done) / self._done
        self.console.print(
            f"{self.what}: {self._done / self.total:.0%} of {self.total:,} tokens, "
            f"ETA {in_words(left)}",
            markup=False,
            soft_wrap=True,
        )


def in_words(seconds: float) -> str:
    """Return a time as 1:05 or 2:03:20."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
