"""Where time and memory go: a trace and a memory snapshot of a few steps; and whether this rank's
device is as fast as the others.

Ranks of one step wait for one another, so their steps all take equally long; a fixed piece of work
that one rank does alone, timed now and then, tells which of them is the slow one.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megahybrid.parallel.mesh import ParallelMesh

# About 50 ms on one CPU core, 5 ms on a GPU.
_SIZES = {"cpu": (512, 8, torch.float32), "cuda": (4096, 16, torch.bfloat16)}


class Profiler:
    """Records steps [start, stop) into `folder`; without steps it does nothing.

    One Chrome trace per rank (trace-rank-0000.json, for Perfetto or chrome://tracing) and on CUDA a
    memory snapshot (memory-rank-0000.pickle, written by torch for its own viewer; never read here).
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, mesh: ParallelMesh) -> None:
        self.steps = steps
        self.folder = folder
        self.mesh = mesh
        self._profile: profile | None = None

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the training step number `step` (from 0)."""
        if self.steps is not None and step == self.steps[0]:
            self._begin()
        try:
            yield
        finally:
            if self._profile is not None:
                self._profile.step()
                if self.steps is not None and step + 1 >= self.steps[1]:
                    self.close()

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        activities = [ProfilerActivity.CPU]
        if self.mesh.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history()
        self._profile = profile(activities=activities, profile_memory=True, record_shapes=True)
        self._profile.start()

    def close(self) -> None:
        """Write what was recorded; harmless when nothing was."""
        if self._profile is None:
            return
        self._profile.stop()
        name = f"rank-{self.mesh.rank:04d}"
        self._profile.export_chrome_trace(str(self.folder / f"trace-{name}.json"))
        if self.mesh.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory-{name}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile = None


def probe_seconds(device: torch.device) -> float:
    """Seconds of a few products on `device`, nobody else waited for."""
    size, times, dtype = _SIZES[device.type]
    values = torch.ones(size, size, dtype=dtype, device=device) / size
    product = values @ values  # what a first product sets up is no part of the measure
    _finish(device)
    started = time.perf_counter()
    for _ in range(times):
        product = product @ values
    _finish(device)
    return time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
