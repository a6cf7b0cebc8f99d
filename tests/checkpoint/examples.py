"""Small checkpoints to write and damage, and ranks that are threads of this process."""

import threading
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megahybrid.checkpoint.collective import Ranks
from megahybrid.checkpoint.fragments import STATES, Array, Fragment, whole
from megahybrid.checkpoint.writer import SaveResult, Snapshot, save

T = TypeVar("T")
SHAPES = {"embedding.weight": (7, 4), "final_norm.weight": (4,), "head.weight": (7, 4)}


def values(name: str, state: str, shape: Sequence[int], step: int = 1) -> Array:
    """Numbers that no other tensor, state or step has."""
    seed = zlib.crc32(f"{name} {state} {step}".encode())
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def plain_fragments(step: int, cuts: int = 1) -> list[Fragment]:
    """Every tensor whole, its elements cut in `cuts` flat ranges."""
    fragments = []
    for name, shape in SHAPES.items():
        for state in STATES:
            flat = values(name, state, shape, step).reshape(-1)
            edges = [len(flat) * index // cuts for index in range(cuts + 1)]
            for start, stop in pairwise(edges):
                data = flat[start:stop]
                fragments.append(Fragment(name, state, whole(shape), (start, stop), data))
    return fragments


def snapshot(step: int, fragments: Sequence[Fragment] | None = None) -> Snapshot:
    """A snapshot of SHAPES at a step."""
    return Snapshot(
        step=step,
        tokens=step * 1000,
        optimizer_step=step,
        model_fingerprint="2x4-1q1kv4-7-pre_norm-rms-000000000000",
        tensors=SHAPES,
        fragments=plain_fragments(step) if fragments is None else fragments,
        train_state={"cursors": {"books": [[0, 12], [3, 0]]}, "lengths": {256: 1}},
        config={"seed": 1},
    )


def save_plain(run: Path, step: int, keep_last: int = 9) -> Path:
    """Save one plain checkpoint and return its folder."""
    result = save(run, snapshot(step), keep_last=keep_last)
    assert result.path is not None, result.error
    return result.path


def save_together(run: Path, snapshots: Sequence[Snapshot], keep_last: int = 9) -> list[SaveResult]:
    """One save by as many ranks as there are snapshots."""
    return together(
        len(snapshots),
        lambda ranks: save(run, snapshots[ranks.rank], keep_last=keep_last, ranks=ranks),
    )


def together(count: int, function: Callable[[Ranks], T]) -> list[T]:
    """Call `function` on `count` ranks at once; the first rank's exception is raised here."""
    barrier = threading.Barrier(count, timeout=30)
    table: list[Any] = [None] * count
    results: list[Any] = [None] * count
    errors: list[BaseException | None] = [None] * count

    def run(rank: int) -> None:
        def gather(value: Any) -> list[Any]:
            table[rank] = value
            barrier.wait()
            gathered = list(table)
            barrier.wait()
            return gathered

        try:
            results[rank] = function(Ranks(rank, count, gather))
        except BaseException as error:
            errors[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if error is not None:
            raise error
    return results
