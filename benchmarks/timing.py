"""Steps timed in turns, A-B-A, so that a machine that slows down slows both."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch


@dataclass
class Times:
    """Seconds of each timed step: by the wall clock and of this process's CPU."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def as_json(self) -> dict:
        """Medians, extremes and every value."""
        return {
            "steps": len(self.wall),
            "wall_median": statistics.median(self.wall),
            "cpu_median": statistics.median(self.cpu),
            "cpu_spread": [min(self.cpu), max(self.cpu)],
            "wall": self.wall,
            "cpu": self.cpu,
        }


def timed(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """(wall seconds, CPU seconds of all threads) of one call, with the device's work finished."""
    synchronise(device)
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    synchronise(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def in_turns(
    steps: Sequence[Callable[[], object]], device: torch.device, rounds: int, warm_up: int = 1
) -> list[Times]:
    """Times of each step function: warm-up, then `rounds` rounds forth and back (A B, B A, …).

    The collector runs between steps, never inside of one.
    """
    times = [Times() for _ in steps]
    for step in steps:
        for _ in range(warm_up):
            step()
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            order = range(len(steps)) if number % 2 == 0 else reversed(range(len(steps)))
            for index in order:
                wall, cpu = timed(steps[index], device)
                times[index].wall.append(wall)
                times[index].cpu.append(cpu)
                gc.collect()
    finally:
        gc.enable()
    return times


def synchronise(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
