"""Megatron's `.idx`: where the sequences and documents of a `.bin` lie.

Layout, little endian: `MMIDIDX\\0\\0`, u64 version 1, u8 dtype code, u64 sequences, u64 entries of
the document index, i32 length of each sequence in tokens, i64 byte pointer of each sequence, i64
document index (sequence numbers, first 0, last the number of sequences).
"""

import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megahybrid.errors import DataError, MegahybridError

Array = npt.NDArray[Any]
Facts = tuple[int, int, int]

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# 6 and 7 are float64 and float32, which cannot be token ids.
DTYPES: dict[int, str] = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
DTYPE_CODES = {name: code for code, name in DTYPES.items()}
CHECK_ENTRIES = 2**20  # entries compared at a time, so that checking needs megabytes, not the file


@dataclass(frozen=True)
class ShardIndex:
    """One `.idx` and the `.bin` it describes; holds sizes only, arrays are mapped on demand."""

    bin_path: Path
    idx_path: Path
    dtype: np.dtype[Any]
    sequences: int
    documents: int
    tokens: int
    facts: tuple[Facts, Facts] = ((0, 0, 0), (0, 0, 0))  # of the .bin and the .idx, at open

    @classmethod
    def open(cls, bin_path: Path, idx_path: Path) -> "ShardIndex":
        """Reads the header and checks it against both files' sizes and the last sequence.

        Costs a few hundred bytes whatever the size of the shard; `check_contents` reads the rest.
        Raises DataError naming the file, what was expected and what was found.
        """
        bin_facts = file_facts(bin_path)
        bin_bytes = bin_facts[0]
        # Opened once and read at four places: a corpus may have thousands of shards.
        file = _open(idx_path)
        try:
            idx_facts = file_facts(file)
            index = cls._parse(file, bin_path, idx_path, bin_bytes, idx_facts[0])
            index._check_end(file, bin_bytes)
        finally:
            os.close(file)
        return replace(index, facts=(bin_facts, idx_facts))

    @classmethod
    def _parse(
        cls, file: int, bin_path: Path, idx_path: Path, bin_bytes: int, idx_bytes: int
    ) -> "ShardIndex":
        raw = os.pread(file, HEADER.size, 0)
        if len(raw) < HEADER.size:
            raise _damaged(idx_path, f"has {len(raw)} bytes, fewer than its header's {HEADER.size}")
        magic, version, code, sequences, entries = HEADER.unpack(raw)
        if magic != MAGIC:
            raise _damaged(idx_path, f"begins with {magic!r}, not {MAGIC!r}")
        if version != 1:
            raise _damaged(idx_path, f"has version {version}, not 1")
        if code not in DTYPES:
            known = ", ".join(f"{number} {name}" for number, name in DTYPES.items())
            raise _damaged(idx_path, f"has dtype code {code}, not one of token ids ({known})")
        expected = HEADER.size + 12 * sequences + 8 * entries
        if idx_bytes != expected:
            raise _damaged(
                idx_path,
                f"has {idx_bytes} bytes, not {expected} (header: {sequences} sequences, "
                f"{entries} document entries)",
            )
        if entries < 1:
            raise _damaged(idx_path, "has no document index (0 entries, not at least 1)")
        dtype = np.dtype(DTYPES[code]).newbyteorder("<")
        return cls(bin_path, idx_path, dtype, sequences, entries - 1, bin_bytes // dtype.itemsize)

    def _check_end(self, file: int, bin_bytes: int) -> None:
        """The last sequence must end where the .bin ends."""
        end = 0
        if self.sequences:
            last_length = _entry(file, "<i", HEADER.size + 4 * (self.sequences - 1))
            pointers = HEADER.size + 4 * self.sequences
            last_pointer = _entry(file, "<q", pointers + 8 * (self.sequences - 1))
            end = last_pointer + last_length * self.dtype.itemsize
        if end != bin_bytes:
            raise DataError(
                f"{self.bin_path} has {bin_bytes} bytes, not {end} (the last offset in "
                f"{self.idx_path.name}). Copy or prepare the data again."
            )
        last_entry = _entry(file, "<q", HEADER.size + 12 * self.sequences + 8 * self.documents)
        if last_entry != self.sequences:
            raise _damaged(
                self.idx_path,
                f"ends its document index with {last_entry}, not {self.sequences} (sequences)",
            )

    def lengths(self) -> Array:
        """Tokens of each sequence [sequences], mapped."""
        return self._map("<i4", HEADER.size, self.sequences)

    def pointers(self) -> Array:
        """Byte offset in the .bin of each sequence [sequences], mapped."""
        return self._map("<i8", HEADER.size + 4 * self.sequences, self.sequences)

    def document_index(self) -> Array:
        """First sequence of each document, then the number of sequences [documents + 1], mapped."""
        return self._map("<i8", HEADER.size + 12 * self.sequences, self.documents + 1)

    def _map(self, dtype: str, offset: int, count: int) -> Array:
        if count == 0:
            return np.zeros(0, dtype)
        try:
            return np.memmap(self.idx_path, dtype=dtype, mode="r", offset=offset, shape=(count,))
        except ValueError:
            raise _damaged(self.idx_path, "is shorter than when it was opened") from None

    def document_spans(self, first: int = 0, stop: int | None = None) -> tuple[Array, Array]:
        """First token within the shard and length in tokens of documents first … stop - 1."""
        stop = self.documents if stop is None else min(stop, self.documents)
        entries = np.asarray(self.document_index()[first : stop + 1])
        pointers = self.pointers()
        starts = np.full(len(entries), self.tokens, np.int64)
        inside = entries < self.sequences
        starts[inside] = pointers[entries[inside]] // self.dtype.itemsize
        return starts[:-1], np.diff(starts)

    def document_starts_between(self, first: int, stop: int) -> Array:
        """Tokens within the shard, in [first, stop), that begin a document, ascending."""
        begins, lengths = self.document_spans(
            self.documents_before(first), self.documents_before(stop)
        )
        return begins[lengths > 0]  # an empty document begins nothing

    def documents_before(self, token: int) -> int:
        """Return how many documents begin before `token`.

        It touches a few pages of the mapped index.
        """
        index, pointers, item = self.document_index(), self.pointers(), self.dtype.itemsize
        low, high = 0, self.documents
        while low < high:
            middle = (low + high) // 2
            sequence = int(index[middle])
            start = self.tokens
            if sequence < self.sequences:
                start = int(pointers[sequence]) // item
            if start < token:
                low = middle + 1
            else:
                high = middle
        return low

    def check_contents(self) -> None:
        """Every sequence must begin where the one before ends, and documents must be in order.

        Reads the whole .idx in pieces. Raises DataError naming the first entry that is wrong.
        """
        item, expected = self.dtype.itemsize, 0
        lengths, pointers = self.lengths(), self.pointers()
        for first in range(0, self.sequences, CHECK_ENTRIES):
            part = np.asarray(lengths[first : first + CHECK_ENTRIES], np.int64)
            if (part < 0).any():
                where = first + int(np.argmax(part < 0))
                raise _damaged(
                    self.idx_path, f"gives sequence {where} {lengths[where]} tokens, not 0 or more"
                )
            ends = expected + np.cumsum(part * item)
            begins = ends - part * item
            wrong = np.asarray(pointers[first : first + CHECK_ENTRIES]) != begins
            if wrong.any():
                index = int(np.argmax(wrong))
                raise _damaged(
                    self.idx_path,
                    f"puts sequence {first + index} at byte {pointers[first + index]}, "
                    f"not {begins[index]} (where the one before ends)",
                )
            expected = int(ends[-1])
        self._check_document_index()

    def _check_document_index(self) -> None:
        index = self.document_index()
        if int(index[0]) != 0:
            raise _damaged(self.idx_path, f"begins its document index with {index[0]}, not 0")
        for first in range(0, self.documents, CHECK_ENTRIES):
            steps = np.diff(np.asarray(index[first : first + CHECK_ENTRIES + 1]))
            if (steps < 0).any():
                where = first + int(np.argmax(steps < 0)) + 1
                raise _damaged(
                    self.idx_path,
                    f"has document entry {where} = {index[where]}, below the one before "
                    f"({index[where - 1]})",
                )


def index_bytes(dtype: str, lengths: Array, document_index: Array) -> list[bytes]:
    """The content of an `.idx` in writing order, for sequences that lie one after another."""
    pointers = np.zeros(len(lengths), "<i8")
    if len(lengths) > 1:
        np.cumsum(lengths[:-1].astype(np.int64) * np.dtype(dtype).itemsize, out=pointers[1:])
    header = HEADER.pack(MAGIC, 1, DTYPE_CODES[dtype], len(lengths), len(document_index))
    return [
        header,
        lengths.astype("<i4").tobytes(),
        pointers.tobytes(),
        document_index.astype("<i8").tobytes(),
    ]


def file_facts(path: Path | int) -> Facts:
    """Bytes, time of change in nanoseconds and inode. Raises DataError."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    return found.st_size, found.st_mtime_ns, found.st_ino


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise _unreadable(path, error) from None


def _entry(file: int, form: str, offset: int) -> int:
    return int(struct.unpack(form, os.pread(file, struct.calcsize(form), offset))[0])


def _unreadable(path: Path | int, error: OSError) -> MegahybridError:
    return DataError(
        f"{path} cannot be read ({error.strerror}). Copy or prepare the data again."
    ).because(error)


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path} {what}. Copy or prepare the data again.")
