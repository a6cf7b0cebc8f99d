"""Requests to a run while it trains: to stop early, by a signal or a file; to save, by a file.

Signals arrive in different steps on different ranks, so nobody acts on its own flag alone: the
ranks agree at a step's end, save, and leave. Files in the run's folder reach a run whose processes
cannot be signalled from where one sits.
"""

import contextlib
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megahybrid.parallel.collectives import all_reduce
from megahybrid.parallel.local_launch import STOP_SIGNALS
from megahybrid.parallel.mesh import ParallelMesh

STOP_NOW = "stop-now"  # save, then end; stays until the run is started again
SAVE_NOW = "save-now"  # write a checkpoint and go on; removed once it was read
LOOK_SECONDS = 1.0  # between two looks at the files: a shared disk is asked no more often


@dataclass(frozen=True)
class Asked:
    """The requests that all ranks agree to follow at the end of this step."""

    stop: bool
    save: bool
    waits: bool  # some rank has no batch for the next step yet


class StopAsked(Exception):
    """Raised on every rank alike where a stop interrupts what would take long."""


class StopRequest:
    """Set by a signal (or by `request`) or by a file in `directory`, which rank 0 looks for; read
    by `agreed` at step boundaries, and by `poll` within what takes longer than a step."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._looked = float("-inf")
        self._save = False
        # A plain value: an Event takes a lock, on which a second signal would wait for ever.
        self._asked = False

    def install(self) -> None:
        """Handle TERM, USR1, INT and HUP; further ones change nothing. Main thread only."""
        for number in STOP_SIGNALS:
            # Under nohup a closed terminal is no reason to stop.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda *_: self.request())
        # Our launcher starts ranks with these held back: what came meanwhile arrives now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def request(self) -> None:
        """Ask for a stop without a signal."""
        self._asked = True

    def agreed(self, mesh: ParallelMesh, *, waits: bool = False) -> Asked:
        """Return what any rank was asked for, alike on every rank. Every rank must call it."""
        self._look(mesh)
        save, self._save = self._save, False
        stop, save, waits = _any([self._asked, save, waits], mesh)
        return Asked(stop, save, waits)

    def poll(self, mesh: ParallelMesh, *, waits: bool = False) -> bool:
        """Between the batches of a validation, the micro-batches of a long first step, or two looks
        for a batch: raises StopAsked where any rank was asked to stop; else whether any rank
        `waits`. Every rank must call it. A save that is wanted stays so."""
        self._look(mesh)
        stop, waits = _any([self._asked, waits], mesh)
        if stop:
            raise StopAsked
        return waits

    def _look(self, mesh: ParallelMesh) -> None:
        """Reads the files, on rank 0."""
        now = time.monotonic()
        if mesh.rank or self._directory is None or now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        if (self._directory / STOP_NOW).exists():
            self.request()
        with contextlib.suppress(OSError):
            (self._directory / SAVE_NOW).unlink()
            self._save = True


def _any(flags: Sequence[bool], mesh: ParallelMesh) -> list[bool]:
    """Return for each flag whether it is set on any rank."""
    if mesh.world.size == 1:
        return list(flags)  # no device has to be waited for
    counts = torch.tensor([float(flag) for flag in flags], device=mesh.device)
    return (all_reduce(all_reduce(counts, mesh.replica), mesh.tensor) > 0).tolist()
