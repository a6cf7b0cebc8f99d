"""A checkpoint's way to the disk and back against torch.save and torch.load of the same bytes.

Ours counts checksums, fsync, manifest and rename; then, apart, reading back and comparing. Loading
is verification of every byte and then the copy into the parameters; torch's is torch.load with
weights_only and the same copy. Files are dropped from the page cache before each load. In turns,
medians, one process.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megahybrid.checkpoint.collective import Ranks
from megahybrid.checkpoint.folders import Retention
from megahybrid.checkpoint.fragments import STATES, Fragment, whole
from megahybrid.checkpoint.reader import Reader, verify
from megahybrid.checkpoint.saver import Saver
from megahybrid.checkpoint.writer import SaveResult, Snapshot, save

ROWS, COLUMNS = 2048, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mebibytes", type=int, default=384, help="of weights and moments")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: temporary)")
    parser.add_argument("--threads", type=int, default=1, help="of torch, as ranks have")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        print(json.dumps(measure(folder, arguments.mebibytes, arguments.rounds), indent=2))
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, mebibytes: int, rounds: int) -> dict[str, Any]:
    """Seconds (medians) and ratios; a ratio above 1 means that ours is faster."""
    count = max(1, mebibytes * 2**20 // (ROWS * COLUMNS * 4 * len(STATES)))
    tensors = {
        f"{state}/blocks.{index}.weight": torch.randn(ROWS, COLUMNS)
        for index in range(count)
        for state in STATES
    }
    total = sum(tensor.numel() * 4 for tensor in tensors.values())
    seconds: dict[str, list[float]] = {}

    def note(what: str, value: float) -> None:
        seconds.setdefault(what, []).append(value)

    save(folder / "ours", _snapshot(tensors, count, 1), keep_last=1)  # first use of everything
    _torch_save(tensors, folder / "torch.pt")
    told: list[SaveResult] = []
    saver = Saver(folder / "ours", Ranks(), told.append)
    for step in range(2, rounds + 2):
        turns: list[Callable[[], None]] = [
            lambda: _time_torch_save(tensors, folder, note),
            lambda: _time_save(tensors, count, folder, step, note),  # noqa: B023
            lambda: _time_torch_load(tensors, folder, note),
            lambda: _time_load(tensors, folder, step, note),  # noqa: B023
        ]
        for turn in turns if step % 2 else [turns[1], turns[0], turns[3], turns[2]]:
            turn()
    for step in range(rounds + 2, 2 * rounds + 3):
        saver.start(_snapshot(tensors, count, step), Retention(1))
        while len(told) < step - rounds - 1:
            saver.poll()
            time.sleep(0.001)
    for result in told[1:]:  # the first one makes the buffer
        note("asynchronous: training waits", result.stall_seconds)
        note("asynchronous: published", result.seconds)
        note("asynchronous: checked", result.checked_seconds)
    median = {what: statistics.median(values) for what, values in seconds.items()}
    return {
        "mebibytes": total / 2**20,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "seconds": {what: round(value, 4) for what, value in median.items()},
        "spread": {
            what: [round(min(values), 4), round(max(values), 4)] for what, values in seconds.items()
        },
        "save, against torch.save with fsync": median["torch.save with fsync"] / median["save"],
        "save, against torch.save alone": median["torch.save"] / median["save"],
        "load with verification, against torch.load": median["torch.load"] / median["load"],
        "stall, of the whole save": median["asynchronous: training waits"]
        / median["asynchronous: checked"],
        "stall, of the save until it is published": median["asynchronous: training waits"]
        / median["asynchronous: published"],
    }


def _snapshot(tensors: dict[str, torch.Tensor], count: int, step: int) -> Snapshot:
    names = [f"blocks.{index}.weight" for index in range(count)]
    fragments = [
        Fragment(
            name,
            state,
            whole((ROWS, COLUMNS)),
            (0, ROWS * COLUMNS),
            tensors[f"{state}/{name}"].view(-1),
        )
        for name in names
        for state in STATES
    ]
    shapes = dict.fromkeys(names, (ROWS, COLUMNS))
    return Snapshot(step, step, step, "benchmark", shapes, fragments, {}, {})


def _torch_save(tensors: dict[str, torch.Tensor], path: Path) -> tuple[float, float]:
    """Seconds of torch.save, and with fsync and the rename that makes it safe."""
    started = time.perf_counter()
    temporary = path.with_suffix(".tmp")
    torch.save(tensors, temporary)
    saved = time.perf_counter() - started
    handle = os.open(temporary, os.O_RDWR)
    os.fsync(handle)
    os.close(handle)
    os.rename(temporary, path)
    return saved, time.perf_counter() - started


def _time_torch_save(
    tensors: dict[str, torch.Tensor], folder: Path, note: Callable[[str, float], None]
) -> None:
    cpu = time.process_time()
    saved, safe = _torch_save(tensors, folder / "torch.pt")
    note("torch.save", saved)
    note("torch.save with fsync", safe)
    note("CPU of torch.save with fsync", time.process_time() - cpu)


def _time_save(
    tensors: dict[str, torch.Tensor],
    count: int,
    folder: Path,
    step: int,
    note: Callable[[str, float], None],
) -> None:
    cpu = time.process_time()
    result = save(folder / "ours", _snapshot(tensors, count, step), keep_last=1)
    note("save", result.seconds)
    note("save and read back", result.checked_seconds)
    note("CPU of save and read back", time.process_time() - cpu)


def _time_torch_load(
    tensors: dict[str, torch.Tensor], folder: Path, note: Callable[[str, float], None]
) -> None:
    _forget(folder / "torch.pt")
    cpu = time.process_time()
    started = time.perf_counter()
    loaded = torch.load(folder / "torch.pt", weights_only=True)
    for name, tensor in loaded.items():
        tensors[name].copy_(tensor)
    note("torch.load", time.perf_counter() - started)
    note("CPU of torch.load", time.process_time() - cpu)


def _time_load(
    tensors: dict[str, torch.Tensor], folder: Path, step: int, note: Callable[[str, float], None]
) -> None:
    path = folder / "ours" / "checkpoints" / f"step-{step:08d}"
    for file in path.iterdir():
        _forget(file)
    cpu = time.process_time()
    started = time.perf_counter()
    verify(path)
    note("of loading: verification", time.perf_counter() - started)
    with Reader(path) as reader:
        for name, tensor in tensors.items():
            state, _, parameter = name.partition("/")
            place = tensor.view(-1).numpy()
            reader.read_flat(parameter, state, whole((ROWS, COLUMNS)), (0, place.size), out=place)
    note("load", time.perf_counter() - started)
    note("CPU of load", time.process_time() - cpu)


def _forget(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


if __name__ == "__main__":
    main()
