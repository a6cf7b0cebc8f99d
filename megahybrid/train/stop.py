"""Stopping early: a signal sets a flag, the ranks agree on it at a step's end, save, and leave.

Signals arrive in different steps on different ranks, so nobody acts on its own flag alone.
"""

import signal

import torch

from megahybrid.parallel.collectives import all_reduce
from megahybrid.parallel.local_launch import STOP_SIGNALS
from megahybrid.parallel.mesh import ParallelMesh


class StopRequest:
    """Set by a signal (or by `request`), read by `agreed` at step boundaries."""

    def __init__(self) -> None:
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

    def agreed(self, mesh: ParallelMesh) -> bool:
        """True on every rank as soon as one rank was asked. Every rank must call it."""
        flag = torch.tensor(float(self._asked), device=mesh.device)
        return all_reduce(all_reduce(flag, mesh.data), mesh.tensor).item() > 0
