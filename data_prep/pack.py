"""`pack`: rows of whole documents for one length, planned without holding the documents.

Best-fit-decreasing needs only how many documents have each length: all documents of a length are
alike, so they are placed by the group, into groups of rows that are alike. Which document is which
is settled afterwards, in files. Memory is some tens of bytes per possible length, whatever the
number of documents.
"""

import mmap
import os
import zlib
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megahybrid.data.dataset import TokenDataset
from megahybrid.data.manifest import write_durably
from megahybrid.data.packing import FILES, PLAN_NAME, Method, PlanInfo
from megahybrid.data_prep.fresh import fresh_folder
from megahybrid.data_prep.limits import LONGEST_ROW
from megahybrid.data_prep.rewrite import refuse_plan
from megahybrid.errors import DataError

CHUNK_DOCUMENTS = 2**18
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Group:
    """`rows` rows that are filled alike: `count` documents of `length` on top of `below`."""

    rows: int
    length: int
    count: int
    below: "Group | None"

    def contents(self) -> list[tuple[int, int]]:
        """(length, count) from the longest to the shortest."""
        found: list[tuple[int, int]] = []
        group: Group | None = self
        while group is not None:
            found.append((group.length, group.count))
            group = group.below
        return found[::-1]


def best_fit_decreasing(counts: Array, length: int) -> list[Group]:
    """Groups of rows that hold counts[n] documents of n tokens for each n up to `length`.

    The same rows as placing one document after another, the longest first, each in the fullest row
    that has room for it.
    """
    done: list[Group] = []
    rooms: list[int] = []  # distinct numbers of free places, ascending
    groups: dict[int, list[Group]] = {}

    def keep(free: int, group: Group) -> None:
        if free == 0:
            done.append(group)
        elif free in groups:
            groups[free].append(group)
        else:
            groups[free] = [group]
            insort(rooms, free)

    for size in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[size])
        while left:
            index = bisect_left(rooms, size)
            free, below, rows = length, None, left  # new rows, unless one has room
            if index < len(rooms):
                free = rooms[index]
                below = groups[free].pop()
                rows = below.rows
                if not groups[free]:
                    del groups[free], rooms[index]
            fits = free // size
            full = min(rows, left // fits)
            if full:
                keep(free - fits * size, Group(full, size, fits, below))
            rows, left = rows - full, left - full * fits
            if left and left < fits and rows:
                keep(free - left * size, Group(1, size, left, below))
                rows, left = rows - 1, 0
            if below is not None and rows:
                keep(free, Group(rows, below.length, below.count, below.below))
    return done + [group for found in groups.values() for group in found]


def pack(
    dataset_path: str | Path,
    output: str | Path,
    length: int,
    *,
    method: Method = "best_fit",
    min_document_tokens: int = 1,
    max_document_tokens: int | None = None,
    vocab_size: int | None = None,
    command: str = "",
    progress: Callable[[int], None] = lambda done_bytes: None,
) -> PlanInfo:
    """Writes a plan into the new folder `output`. Document lengths count eod.

    best_fit cuts no document that fits a row; of longer ones every row but the last is full. stream
    puts the documents one after another and cuts every `length` tokens.
    Raises DataError when no document is within the limits.
    """
    target = Path(output)
    dataset = TokenDataset(dataset_path, vocab_size=vocab_size)
    refuse_plan(dataset)
    if not 1 <= length <= LONGEST_ROW:
        raise DataError(
            f"--length={length} is not from 1 to {LONGEST_ROW} (tokens of a row). Use the stage's "
            "length."
        )
    limits = (min_document_tokens, max_document_tokens or 2**62)
    source = _Source(dataset, limits, progress)
    with fresh_folder(target) as folder:
        with _Writer(folder) as writer:
            if method == "best_fit":
                _write_best_fit(source, length, writer, folder)
            else:
                _write_stream(source, length, writer)
            if not writer.entries:
                raise DataError(
                    f"{dataset_path} has no document of {min_document_tokens} to "
                    f"{max_document_tokens or 'any number of'} tokens. Widen the limits."
                )
            info = PlanInfo(
                dataset=str(_relative(dataset.path, target)),
                dataset_fingerprint=dataset.fingerprint,
                method=method,
                length=length,
                min_document_tokens=min_document_tokens,
                max_document_tokens=max_document_tokens,
                rows=writer.rows,
                entries=writer.entries,
                documents=source.documents,
                tokens=writer.tokens,
                crc32=writer.crc32(),
                command=command,
            )
        write_durably(folder / PLAN_NAME, info.dump().encode())
    return info


class _Source:
    """Documents within the limits, in the dataset's order, chunk by chunk."""

    def __init__(
        self, dataset: TokenDataset, limits: tuple[int, int], progress: Callable[[int], None]
    ) -> None:
        self.dataset, self.limits, self.progress = dataset, limits, progress
        self.documents = 0

    def chunks(self) -> Iterator[tuple[Array, Array]]:
        """Yield first tokens and lengths."""
        self.documents = 0
        for number, shard in enumerate(self.dataset.shards):
            for first in range(0, shard.documents, CHUNK_DOCUMENTS):
                starts, lengths = shard.document_spans(first, first + CHUNK_DOCUMENTS)
                keep = (lengths >= max(1, self.limits[0])) & (lengths <= self.limits[1])
                self.documents += int(keep.sum())
                yield starts[keep] + self.dataset.starts[number], lengths[keep]
                self.progress(int(lengths.sum()) * self.dataset.dtype.itemsize)

    def items(self, length: int) -> Iterator[tuple[Array, Array]]:
        """The same, with documents beyond `length` cut into full rows and a rest."""
        for starts, sizes in self.chunks():
            long = np.flatnonzero(sizes > length)
            if len(long):
                pieces = -(-sizes[long] // length)
                first = np.repeat(starts[long], pieces)
                index = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
                ends = np.repeat(starts[long] + sizes[long], pieces)
                cut = first + index * length
                short = sizes <= length
                starts = np.concatenate([starts[short], cut])
                sizes = np.concatenate([sizes[short], np.minimum(length, ends - cut)])
                order = np.argsort(starts)
                starts, sizes = starts[order], sizes[order]
            yield starts, sizes


class _Writer:
    """The three arrays of a plan."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, BinaryIO] = {
            name: open(folder / name, "wb")  # noqa: SIM115
            for name in FILES
        }
        self._crc = dict.fromkeys(FILES, 0)
        self.rows = self.entries = self.tokens = 0
        self._put("rows.i64", np.zeros(1, "<i8"))

    def _put(self, name: str, values: Array) -> None:
        raw = np.ascontiguousarray(values, FILES[name]).tobytes()
        self._crc[name] = zlib.crc32(raw, self._crc[name])
        self._files[name].write(raw)

    def add(self, starts: Array, lengths: Array, row_ends: Array) -> None:
        """Entries in order; `row_ends` are those numbers of entries after which a row ends."""
        self._put("starts.i64", starts)
        self._put("lengths.i32", lengths)
        self._put("rows.i64", row_ends + self.entries)
        self.rows += len(row_ends)
        self.entries += len(starts)
        self.tokens += int(lengths.sum())

    def crc32(self) -> dict[str, int]:
        """Checksums of the files, which are closed."""
        for file in self._files.values():
            file.close()
        return self._crc

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.crc32()


def _write_best_fit(source: _Source, length: int, writer: _Writer, folder: Path) -> None:
    counts = np.zeros(length + 1, np.int64)
    for _, sizes in source.items(length):
        counts += np.bincount(sizes, minlength=length + 1)
    total = int(counts.sum())
    if not total:
        return
    groups = best_fit_decreasing(counts, length)
    # Starts of all documents of one length lie together; `next_of` is the first not yet used.
    by_length = np.memmap(folder / "items.tmp", "<i8", mode="w+", shape=(total,))
    next_of = np.cumsum(counts) - counts
    filled = next_of.copy()
    for starts, sizes in source.items(length):
        order = np.argsort(sizes, kind="stable")
        starts, sizes = starts[order], sizes[order]
        first = np.searchsorted(sizes, sizes)
        by_length[filled[sizes] + np.arange(len(sizes)) - first] = starts
        filled += np.bincount(sizes, minlength=length + 1)
        _forget(by_length)
    for group in groups:
        contents = group.contents()
        entries = sum(count for _, count in contents)
        lengths = np.repeat([size for size, _ in contents], [count for _, count in contents])
        step = max(1, CHUNK_DOCUMENTS // entries)
        for first_row in range(0, group.rows, step):
            rows = min(step, group.rows - first_row)
            columns = []
            for size, count in contents:
                begin = int(next_of[size])
                columns.append(by_length[begin : begin + rows * count].reshape(rows, count))
                next_of[size] += rows * count
            ends = np.arange(1, rows + 1) * entries
            writer.add(np.concatenate(columns, axis=1).ravel(), np.tile(lengths, rows), ends)
            _forget(by_length)
    del by_length
    (folder / "items.tmp").unlink()


def _forget(values: Array) -> None:
    """Lets the system take the pages back; what was written stays in the file."""
    mapped = getattr(values, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _write_stream(source: _Source, length: int, writer: _Writer) -> None:
    position = 0
    for starts, sizes in source.chunks():
        if not len(starts):
            continue
        begins = position + np.cumsum(sizes) - sizes
        # A document that crosses n row ends becomes n + 1 entries.
        pieces = (begins + sizes - 1) // length - begins // length + 1
        row = np.repeat(begins // length, pieces)
        row += np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        low = np.maximum(np.repeat(begins, pieces), row * length)
        high = np.minimum(np.repeat(begins + sizes, pieces), (row + 1) * length)
        shift = np.repeat(starts - begins, pieces)
        writer.add(low + shift, high - low, np.flatnonzero(high == (row + 1) * length) + 1)
        position += int(sizes.sum())
    if position % length:
        writer.add(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(1, np.int64))


def _relative(path: Path, folder: Path) -> Path:
    return Path(os.path.relpath(path, folder))
