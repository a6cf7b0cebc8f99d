"""What is asked of a run while it trains: to stop early, by a signal or a file; to save, by a file.

Signals arrive in different steps on different ranks, so nobody acts on its own flag alone: the
ranks agree at a step's end, save, and leave. Files in the run's folder reach a run whose processes
cannot be signalled from where one sits.
"""

import signal
import time
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
    """What all ranks agree to do at the end of this step."""

    stop: bool
    save: bool


class StopRequest:
    """Set by a signal (or by `request`) or by a file in `directory`, which rank 0 looks for; read
    by `agreed` at step boundaries."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._looked = float("-inf")
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

    def agreed(self, mesh: ParallelMesh) -> Asked:
        """What any rank was asked for, alike on every rank. Every rank must call it."""
        save = self._look() if mesh.rank == 0 else False
        flags = torch.tensor([float(self._asked), float(save)], device=mesh.device)
        stop, save = (all_reduce(all_reduce(flags, mesh.data), mesh.tensor) > 0).tolist()
        return Asked(stop, save)

    def _look(self) -> bool:
        """Reads the files; returns whether a checkpoint is wanted."""
        now = time.monotonic()
        if self._directory is None or now - self._looked < LOOK_SECONDS:
            return False
        self._looked = now
        if (self._directory / STOP_NOW).exists():
            self.request()
        try:
            (self._directory / SAVE_NOW).unlink()
        except OSError:
            return False
        return True
