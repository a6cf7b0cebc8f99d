"""From encoded units to datasets: documents in keyed order, a part of them held out.

External: the keys are cut into ranges ("buckets") so small that one fits in the memory allowed; the
documents of a bucket lie together in every unit, because units are sorted.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.encode_unit import RECORD, Records, unit_path
from megahybrid.data.token_writer import TokenWriter

Digest = tuple[int, int]


@dataclass(frozen=True)
class Split:
    """held_out: fraction of documents by hash. longest: this many longest documents, apart."""

    held_out: float
    longest: int


def longest_documents(folder: Path, units: int, count: int) -> frozenset[Digest]:
    """Key and split of the `count` longest documents (ties: the smaller key first)."""
    best: list[tuple[int, int, int]] = []
    for number in range(units):
        records = _records(folder, number)
        if count and len(records):
            top = np.argsort(-records["length"], kind="stable")[:count]
            found = {(int(r["length"]), -int(r["key"]), int(r["split"])) for r in records[top]}
            best = heapq.nlargest(count, found | set(best))
    return frozenset((-key, split) for _, key, split in best)


def merge_units(
    folder: Path,
    units: int,
    split: Split,
    writers: dict[str, TokenWriter],
    *,
    memory_bytes: int,
    progress: Callable[[int], None] = lambda done_bytes: None,
) -> None:
    """Writes every document to writers["train"], ["held_out"] or ["held_out_long"]."""
    dtype = np.dtype(writers["train"].tokenizer.dtype)
    total = sum(unit_path(folder, n, "tokens").stat().st_size for n in range(units))
    long = longest_documents(folder, units, split.longest)
    # Three times: the pieces, their concatenation in order, and the writer's view of it.
    buckets = max(1, -(-3 * total // memory_bytes))
    bounds = [2**64 * bucket // buckets for bucket in range(buckets + 1)]
    for low, high in pairwise(bounds):
        records, pieces = _bucket(folder, units, low, high, dtype)
        if not len(records):
            continue
        held = _held_out(records, split.held_out)
        is_long = np.zeros(len(records), bool)
        for index in np.flatnonzero(np.isin(records["key"], _keys(long))) if long else ():
            is_long[index] = (int(records["key"][index]), int(records["split"][index])) in long
        order = np.argsort(records["key"], kind="stable")
        for name, chosen in (
            ("train", ~held & ~is_long),
            ("held_out", held & ~is_long),
            ("held_out_long", is_long),
        ):
            wanted = order[chosen[order]]
            if len(wanted):
                tokens = np.concatenate([pieces[index] for index in wanted])
                writers[name].add_documents(tokens, records["length"][wanted])
        progress(int(records["length"].sum()) * dtype.itemsize)


def _records(folder: Path, number: int) -> Records:
    path = unit_path(folder, number, "records")
    if path.stat().st_size == 0:
        return np.zeros(0, RECORD)
    return np.memmap(path, RECORD, mode="r")


def _bucket(
    folder: Path, units: int, low: int, high: int, dtype: np.dtype[Any]
) -> tuple[Records, list[npt.NDArray[Any]]]:
    """Records with low <= key < high, in unit order, and the tokens of each."""
    found: list[Records] = [np.zeros(0, RECORD)]
    pieces: list[npt.NDArray[Any]] = []
    for number in range(units):
        records = _records(folder, number)
        keys = records["key"]
        first = int(np.searchsorted(keys, np.uint64(low)))
        stop = len(keys) if high == 2**64 else int(np.searchsorted(keys, np.uint64(high)))
        part = np.array(records[first:stop])
        if not len(part):
            continue
        begin = int(part["offset"][0])
        tokens = np.fromfile(
            unit_path(folder, number, "tokens"),
            dtype,
            count=int(part["length"].sum()),
            offset=begin * dtype.itemsize,
        )
        pieces += np.split(tokens, np.cumsum(part["length"])[:-1])
        found.append(part)
    return np.concatenate(found), pieces


def _held_out(records: Records, fraction: float) -> npt.NDArray[np.bool_]:
    if fraction >= 1:
        return np.ones(len(records), bool)
    return np.asarray(records["split"] < np.uint64(int(fraction * 2**64)))


def _keys(digests: frozenset[Digest]) -> npt.NDArray[np.uint64]:
    return np.asarray([key for key, _ in digests], np.uint64)
