"""The merge of encoded units into datasets: keyed order, copies left out, a part held out.

External: the keys are cut into ranges ("buckets") so small that one fits in the memory allowed; the
documents of a bucket lie together in every run, because runs are sorted. A document that is large
beside that memory is copied in pieces.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megahybrid.data.manifest import Manifest
from megahybrid.data.token_writer import TokenWriter
from megahybrid.data_prep.loss import Refused
from megahybrid.data_prep.unit_files import RECORD, Records, UnitResult, unit_path

Digest = tuple[int, int]
Tokens = npt.NDArray[Any]
_Piece = tuple[Tokens, Tokens | None]  # a document's tokens, and whether each is a target
BOOL = np.dtype(np.bool_)

RECORD_COST = 300  # bytes that a document needs beside its tokens while its bucket is held
FINE_BITS = 16
COPY_TOKENS = 2**22


@dataclass(frozen=True)
class Split:
    """held_out: fraction of documents by hash. longest: this many longest documents, apart.

    deduplicate: of documents with the same text only the first is kept.
    """

    held_out: float
    longest: int
    deduplicate: bool = False


@dataclass(frozen=True)
class _Run:
    """One sorted run: records first … stop - 1 of a unit."""

    tokens: Path
    records: Path
    metadata_lines: Path
    first: int
    stop: int
    counts: Path | None = None  # a byte for each token: whether it is a target; None: all are

    def mapped(self) -> Records:
        return np.memmap(
            self.records,
            RECORD,
            mode="r",
            offset=self.first * RECORD.itemsize,
            shape=(self.stop - self.first,),
        )


def runs_of(folder: Path, results: Sequence[UnitResult]) -> list[_Run]:
    """All runs, in the order of the units."""
    found = []
    for result in results:
        first = 0
        for count in result.runs:
            tokens = unit_path(folder, result.number, "tokens")
            records = unit_path(folder, result.number, "records")
            metadata_lines = unit_path(folder, result.number, "notes")
            counts: Path | None = unit_path(folder, result.number, "counts")
            counts = counts if counts is not None and counts.exists() else None
            found.append(_Run(tokens, records, metadata_lines, first, first + count, counts))
            first += count
    return found


def longest_documents(runs: Sequence[_Run], count: int) -> frozenset[Digest]:
    """Key and split of the `count` longest documents (ties: the smaller key first)."""
    best: list[tuple[int, int, int]] = []
    for run in runs if count else ():
        records = run.mapped()
        top = np.argsort(-records["length"], kind="stable")[:count]
        # Of documents that are as long as the last one taken, all compete.
        top = np.flatnonzero(records["length"] >= records["length"][top[-1]])
        found = {(int(r["length"]), -int(r["key"]), int(r["split"])) for r in records[top]}
        best = heapq.nlargest(count, found | set(best))
    return frozenset((-key, split) for _, key, split in best)


@dataclass
class Merge:
    """Writes every document to writers["train"], ["held_out"] or ["held_out_long"]."""

    runs: Sequence[_Run]
    split: Split
    writers: dict[str, TokenWriter]
    memory_bytes: int
    progress: Callable[[int], None] = lambda done_bytes: None
    duplicates: int = 0

    def __post_init__(self) -> None:
        self.dtype = np.dtype(self.writers["train"].tokenizer.dtype)
        self.large = max(1, self.memory_bytes // (8 * self.dtype.itemsize))  # tokens
        self.long = longest_documents(self.runs, self.split.longest)

    def run(self) -> None:
        """Bucket after bucket, in the order of the keys."""
        for low, high in pairwise(self._bounds()):
            self._bucket(low, high)

    def refuse_empty_parts(self, made: Mapping[str, Manifest]) -> None:
        """Raise Refused where a part has no document, or none is left to train on.

        Held-out scores over nothing would say nothing.
        """
        split, total = self.split, sum(part.documents for part in made.values())
        if not made["train"].documents:
            raise Refused(
                f"held_out={split.held_out} and longest={split.longest} leave no document to train "
                f"on (of {total}). Hold out less."
            )
        if "held_out" in made and not made["held_out"].documents:
            least = math.ceil(1000 * self._least_fraction()) / 1000
            more = (
                f"held_out={least:g} or more, or longest=1 in its place, or " if total > 1 else ""
            )
            raise Refused(
                f"held_out={split.held_out} holds out none of {total} documents (each is drawn by "
                f"the hash of its text). Use {more}inputs cut into more documents."
            )

    def _least_fraction(self) -> float:
        """The smallest fraction that would hold a document out."""
        least = 2**64
        for run in self.runs:
            records = run.mapped()
            short = ~np.isin(records["key"], _keys(self.long))
            if short.any():
                least = min(least, int(records["split"][short].min()))
        return (least + 1) / 2**64

    def _bounds(self) -> list[int]:
        """Keys that cut the documents into buckets of at most half of the memory."""
        cost = np.zeros(2**FINE_BITS)
        for run in self.runs:
            records = run.mapped()
            for first in range(0, len(records), 2**20):
                part = np.array(records[first : first + 2**20])
                size = np.where(part["length"] > self.large, 0, part["length"])
                where = (part["key"] >> np.uint64(64 - FINE_BITS)).astype(np.int64)
                item = self.dtype.itemsize + (run.counts is not None)
                weights = size * item + part["note_length"] + RECORD_COST
                cost += np.bincount(where, weights, minlength=len(cost))
        bounds, held = [0], 0.0
        for index, size in enumerate(cost):
            if held and held + size > self.memory_bytes / 2:
                bounds.append(index << (64 - FINE_BITS))
                held = 0.0
            held += size
        return [*bounds, 2**64]

    def _bucket(self, low: int, high: int) -> None:
        """Records with low <= key < high."""
        found: list[Records] = []
        pieces: list[_Piece | None] = []  # None: large, to be copied from its file
        metadata_lines: list[bytes] = []
        origin: list[npt.NDArray[Any]] = []
        for number, run in enumerate(self.runs):
            records = run.mapped()
            first = int(np.searchsorted(records["key"], np.uint64(low)))
            stop = len(records)
            if high < 2**64:
                stop = int(np.searchsorted(records["key"], np.uint64(high)))
            if first < stop:
                found.append(np.array(records[first:stop]))
                origin.append(np.full(stop - first, number))
                pieces += self._pieces(run, found[-1])
                metadata_lines += _metadata(run, found[-1])
        if not found:
            return
        records = np.concatenate(found)
        runs = np.concatenate(origin)
        order = np.argsort(records["key"], kind="stable")
        if self.split.deduplicate:
            order = self._without_copies(records, order)
        held = _held_out(records, self.split.held_out)
        is_long = np.zeros(len(records), bool)
        for index in np.flatnonzero(np.isin(records["key"], _keys(self.long))) if self.long else ():
            is_long[index] = (int(records["key"][index]), int(records["split"][index])) in self.long
        for name, chosen in (
            ("train", ~held & ~is_long),
            ("held_out", held & ~is_long),
            ("held_out_long", is_long),
        ):
            self._write(name, records, runs, pieces, metadata_lines, order[chosen[order]])

    def _pieces(self, run: _Run, records: Records) -> Iterator[_Piece | None]:
        """Tokens of consecutive records: one read for each stretch without a large document."""
        large = np.flatnonzero(records["length"] > self.large)
        begin = 0
        for end in [*large.tolist(), len(records)]:
            part = records[begin:end]
            if len(part):
                size, offset = int(part["length"].sum()), int(part["offset"][0])
                tokens = _read(run.tokens, self.dtype, offset, size)
                ends = np.cumsum(part["length"])[:-1]
                counts: Iterable[Tokens | None] = repeat(None, len(part))
                if run.counts is not None:
                    counts = np.split(_read(run.counts, BOOL, offset, size), ends)
                yield from zip(np.split(tokens, ends), counts, strict=True)
            if end < len(records):
                yield None
            begin = end + 1

    def _without_copies(self, records: Records, order: npt.NDArray[Any]) -> npt.NDArray[Any]:
        # Among equal keys, equal splits must be neighbours; the first in the input stays first.
        order = np.lexsort((np.arange(len(records)), records["split"], records["key"]))
        keys, splits = records["key"][order], records["split"][order]
        again = (keys[1:] == keys[:-1]) & (splits[1:] == splits[:-1])
        self.duplicates += int(again.sum())
        return order[np.concatenate([[True], ~again])]

    def _write(
        self,
        name: str,
        records: Records,
        runs: npt.NDArray[Any],
        pieces: list[_Piece | None],
        metadata_lines: list[bytes],
        wanted: npt.NDArray[Any],
    ) -> None:
        writer = self.writers[name] if len(wanted) else None
        held: list[_Piece] = []
        held_metadata: list[bytes] = []
        size = 0

        def flush() -> None:
            nonlocal held, held_metadata, size
            if held and writer is not None:
                tokens = [one for one, _ in held]
                lengths = np.fromiter(map(len, tokens), np.int64, len(held))
                writer.add_documents(
                    np.concatenate(tokens), lengths, _counts(held), metadata_lines=held_metadata
                )
                self.progress(size * self.dtype.itemsize)
            held, held_metadata, size = [], [], 0

        for index in wanted:
            piece = pieces[index]
            if piece is not None:
                held.append(piece)
                held_metadata.append(metadata_lines[index])
                size += len(piece[0])
                if size >= COPY_TOKENS:
                    flush()
                continue
            flush()
            record = records[index]
            length = int(record["length"])
            run, offset = self.runs[int(runs[index])], int(record["offset"])
            assert writer is not None
            tokens_of = _copy(run.tokens, self.dtype, offset, length)
            counts = None if run.counts is None else _copy(run.counts, BOOL, offset, length)
            writer.add_long(tokens_of, length, metadata_lines[index], counts)
            self.progress(length * self.dtype.itemsize)
        flush()


def _read(path: Path, dtype: np.dtype[Any], offset: int, size: int) -> Tokens:
    return np.fromfile(path, dtype, count=size, offset=offset * dtype.itemsize)


def _copy(path: Path, dtype: np.dtype[Any], offset: int, length: int) -> Iterator[Tokens]:
    for first in range(0, length, COPY_TOKENS):
        yield _read(path, dtype, offset + first, min(COPY_TOKENS, length - first))


def _counts(pieces: Sequence[_Piece]) -> Tokens | None:
    """Return which tokens of documents are targets; None where none of them says so."""
    if all(counts is None for _, counts in pieces):
        return None
    told = [np.ones(len(one), bool) if counts is None else counts for one, counts in pieces]
    return np.concatenate(told)


def _metadata(run: _Run, records: Records) -> list[bytes]:
    """Return the metadata of consecutive records, in one read.

    The lines are empty where nothing was kept.
    """
    ends = np.cumsum(records["note_length"], dtype=np.int64)
    if not ends[-1]:
        return [b""] * len(records)
    with open(run.metadata_lines, "rb") as file:
        file.seek(int(records["note"][0]))
        raw = file.read(int(ends[-1]))
    return [raw[begin:end] for begin, end in pairwise([0, *ends.tolist()])]


def _held_out(records: Records, fraction: float) -> npt.NDArray[np.bool_]:
    if fraction >= 1:
        return np.ones(len(records), bool)
    return np.asarray(records["split"] < np.uint64(int(fraction * 2**64)))


def _keys(digests: frozenset[Digest]) -> npt.NDArray[np.uint64]:
    return np.asarray([key for key, _ in digests], np.uint64)
