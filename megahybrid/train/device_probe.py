"""Is this rank's device as fast as the others? A fixed piece of work, alone, timed now and then.

Ranks of one step wait for one another, so their steps all take equally long; what one rank does
alone tells which of them is the slow one.
"""

import time

import torch

# About 50 ms on one CPU core, 5 ms on a GPU.
_SIZES = {"cpu": (512, 8, torch.float32), "cuda": (4096, 16, torch.bfloat16)}


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
