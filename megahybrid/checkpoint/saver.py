"""Saving beside the training: it waits for a copy to host memory; a thread does the rest.

The thread of a rank only writes and reads files. What the ranks have to tell each other they tell
on the main thread, at step boundaries, in the same order everywhere: a collective of the thread
could meet one of the training and both would wait for ever. So `poll` is called after each step; it
costs one small exchange while a save is under way, and nothing otherwise.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megahybrid.checkpoint.collective import ActionOutcome, Ranks, agree, exchange, perform
from megahybrid.checkpoint.folders import Retention
from megahybrid.checkpoint.host_copy import HostCopy
from megahybrid.checkpoint.writer import (
    SHORT_PHASES,
    Phases,
    SaveResult,
    Snapshot,
    advance,
    run_phases,
    save_phases,
)


class Saver:
    """The saves of one run on one rank, one at a time. Every method is collective.

    `report` is told what became of each save, on every rank. A failure of the machine is a result;
    what should not happen (fragments that do not cover the tensors, a mistake of ours on some rank)
    is raised on every rank by the call that learns of it.
    """

    def __init__(
        self,
        run_directory: Path | str,
        ranks: Ranks,
        report: Callable[[SaveResult], None],
        check: Callable[[], None] | None = None,
    ) -> None:
        self._directory = Path(run_directory)
        self._ranks = ranks
        self._report = report
        self._check = check
        self._memory = HostCopy()
        self._under_way: _UnderWay | None = None

    def start(self, snapshot: Snapshot, retention: Retention) -> SaveResult | None:
        """Copy the snapshot and begin to write it; one that is still being written is waited for.

        Returns a result only where the save was refused at once, as by a disk too full.
        """
        self.finish()
        started = time.monotonic()
        copied = replace(snapshot, fragments=self._memory.take(snapshot.fragments))
        steps = save_phases(self._directory, copied, self._ranks, retention, self._check)
        action = next(steps)
        try:
            for _ in range(SHORT_PHASES):
                action = advance(steps, partial(agree, self._ranks, action))
        except StopIteration as end:
            return self._finish_save(end.value, time.monotonic() - started)
        self._under_way = _UnderWay(steps, action, time.monotonic() - started)
        return None

    def save(self, snapshot: Snapshot, retention: Retention) -> SaveResult:
        """Write the snapshot while training waits: nothing is copied."""
        self.finish()
        steps = save_phases(self._directory, snapshot, self._ranks, retention, self._check)
        return self._finish_save(run_phases(steps, self._ranks))

    def poll(self) -> None:
        """Move on a save whose phase is done on every rank; returns at once where it is not."""
        if self._under_way is not None and all(self._ranks.gather(self._under_way.ready())):
            self._move_on(self._under_way)

    def finish(self) -> None:
        """Wait until no save is under way: before the next one, at a stage's end, at the exit."""
        while self._under_way is not None:
            self._move_on(self._under_way)

    def _move_on(self, save: "_UnderWay") -> None:
        started = time.monotonic()
        answer = save.answer()
        try:
            action = advance(save.steps, lambda: exchange(self._ranks, answer))
        except StopIteration as end:
            self._under_way = None
            self._finish_save(end.value, save.stalled + time.monotonic() - started)
        except BaseException:
            self._under_way = None
            raise
        else:
            save.begin(action)
            save.stalled += time.monotonic() - started

    def _finish_save(self, result: SaveResult, stalled: float | None = None) -> SaveResult:
        if stalled is not None:
            result = replace(result, stall_seconds=stalled)
        self._report(result)
        return result


class _UnderWay:
    """A save whose present phase runs on a thread of this rank."""

    def __init__(self, steps: Phases, action: Callable[[], Any], stalled: float) -> None:
        self.steps = steps
        self.stalled = stalled  # seconds that training waited
        self.begin(action)

    def begin(self, action: Callable[[], Any]) -> None:
        """Run the next phase beside the training."""
        self._answer: ActionOutcome | None = None
        # A daemon: an attempt that fails must end, and leaves only what the next one clears away.
        self._thread = threading.Thread(
            target=self._run, args=(action,), name="checkpoint", daemon=True
        )
        self._thread.start()

    def ready(self) -> bool:
        """Return whether the phase is done here."""
        return not self._thread.is_alive()

    def answer(self) -> ActionOutcome:
        """Wait for the phase's outcome and return it."""
        self._thread.join()
        assert self._answer is not None
        return self._answer

    def _run(self, action: Callable[[], Any]) -> None:
        self._answer = perform(action)
