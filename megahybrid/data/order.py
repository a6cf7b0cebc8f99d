"""The order in which a source's tokens are met: a keyed permutation of blocks, read by lanes.

The source's tokens are cut into N blocks of `block_tokens` (the last may be short). Block n of the
endless sequence is, in epoch n // N, the block that the epoch's permutation puts at n mod N; it
belongs to lane n mod lanes. A row takes its tokens from the least advanced lane (ties: the lowest);
at its block's end it goes on in the lane's next block. Nothing is stored but [n, offset] per lane.
"""

import hashlib
import heapq
import json
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from megahybrid.errors import DataError

Span = tuple[int, int]  # first token within the source, number of tokens
Cursor = list[list[int]]  # [block of the endless sequence, offset within it] for each lane

ROUNDS = 10
_MASK = 2**64 - 1


class Permutation:
    """A bijection of 0 … size - 1, determined by its key, evaluated one value at a time.

    A Feistel network over two halves of unequal size with modular addition (as in format-preserving
    encryption's FE1), on the smallest rectangle that holds `size`; values outside are sent through
    again until they fall inside.
    """

    def __init__(self, size: int, *key: object) -> None:
        self.size = size
        self._rows = max(1, int(np.ceil(np.sqrt(size))))
        self._columns = max(1, -(-size // self._rows))
        digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=64).digest()
        digest += hashlib.blake2b(digest, digest_size=64).digest()
        self._keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS)]

    def __call__(self, index: int) -> int:
        """Return where `index` goes."""
        rows, columns = self._rows, self._columns
        while True:
            left, right = divmod(index, columns)
            for number, key in enumerate(self._keys):
                if number % 2:
                    right = (right + _mix(left + key & _MASK)) % columns
                else:
                    left = (left + _mix(right + key & _MASK)) % rows
            index = left * columns + right
            if index < self.size:
                return index

    def array(self, indices: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
        """The same for many values at once."""
        rows, columns = np.uint64(self._rows), np.uint64(self._columns)
        values = np.asarray(indices, np.uint64).copy()
        todo = np.ones(len(values), bool)
        while todo.any():
            left, right = values[todo] // columns, values[todo] % columns
            for number, key in enumerate(self._keys):
                if number % 2:
                    right = (right + _mix_array(left + np.uint64(key))) % columns
                else:
                    left = (left + _mix_array(right + np.uint64(key))) % rows
            values[todo] = left * columns + right
            todo = values >= np.uint64(self.size)
        return values


def _mix(value: int) -> int:
    """The finaliser of splitmix64, halved so that numpy's sums below cannot wrap."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return (value ^ value >> 31) >> 1


def _mix_array(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return (value ^ value >> np.uint64(31)) >> np.uint64(1)


class SourceOrder:
    """The endless order of one source of `tokens` tokens: a pure function of its arguments.

    A source smaller than lanes * block_tokens uses fewer lanes: as many as it has whole blocks.
    Whole blocks give no joins while every length so far divides block_tokens and the one before it
    (a longer length later on finds lanes at odd multiples of the shorter one: at most one join per
    block follows); the short last block ends in one.
    """

    def __init__(self, tokens: int, *, seed: int, name: str, block_tokens: int, lanes: int) -> None:
        if tokens < 1:
            raise DataError(f"data.sources.{name} holds no tokens. Leave it out of the run.")
        self.tokens, self.block_tokens = tokens, block_tokens
        self.blocks = -(-tokens // block_tokens)
        self.lanes = max(1, min(lanes, tokens // block_tokens))
        self.name = name
        # Lanes are never more than a few epochs apart, so a handful of permutations is enough.
        self._permutation = lru_cache(maxsize=8)(
            lambda epoch: Permutation(self.blocks, seed, name, epoch)
        )
        self._block_span = lru_cache(maxsize=2 * self.lanes + 2)(self._find_block_span)

    def start(self) -> Cursor:
        """The cursor before the first token."""
        return [[lane, 0] for lane in range(self.lanes)]

    def block_span(self, n: int) -> Span:
        """First token and length of block n of the endless sequence."""
        return self._block_span(n)

    def _find_block_span(self, n: int) -> Span:
        epoch, index = divmod(n, self.blocks)
        first = self._permutation(epoch)(index) * self.block_tokens
        return first, min(self.block_tokens, self.tokens - first)

    def take(
        self, cursor: Sequence[Sequence[int]], length: int, rows: int
    ) -> tuple[list[tuple[Span, ...]], Cursor]:
        """The next `rows` rows of `length` tokens as spans, and the cursor after them.

        Consecutive spans of a row are joins, even where chance put them side by side on disk.
        """
        lanes, block_tokens, block_span = self.lanes, self.block_tokens, self._block_span
        after = [list(lane) for lane in cursor]
        heap = [
            (n // lanes * block_tokens + offset, lane) for lane, (n, offset) in enumerate(after)
        ]
        heapq.heapify(heap)
        taken: list[tuple[Span, ...]] = []
        for _ in range(rows):
            lane = heap[0][1]
            n, offset = after[lane]
            first, size = block_span(n)
            end = offset + length
            if end < size:
                taken.append(((first + offset, length),))
                after[lane][1] = end
                heapq.heapreplace(heap, (heap[0][0] + length, lane))
                continue
            spans, n, offset = self._cross(n, offset, length)
            taken.append(spans)
            after[lane] = [n, offset]
            heapq.heapreplace(heap, (n // lanes * block_tokens + offset, lane))
        return taken, after

    def _cross(self, n: int, offset: int, length: int) -> tuple[tuple[Span, ...], int, int]:
        """A row that reaches its block's end: its spans, and the lane's cursor after it."""
        spans = []
        while length:
            first, size = self._block_span(n)
            part = min(length, size - offset)
            spans.append((first + offset, part))
            length -= part
            offset += part
            if offset == size:
                n, offset = n + self.lanes, 0
        return tuple(spans), n, offset

    def take_once(
        self, cursor: Sequence[Sequence[int]], length: int, rows: int
    ) -> tuple[list[tuple[Span, ...]], Cursor]:
        """Take rows as `take` does, but of the first epoch only.

        A lane that is through it waits for the others. The last rows, for which no lane has enough
        left, are joined from several. The caller sees to it that rows * length tokens of the epoch
        are left.
        """
        ahead = rows * length // (self.lanes * self.block_tokens) + 3
        if max(n for n, _ in cursor) + ahead * self.lanes < self.blocks:
            return self.take(cursor, length, rows)
        after = [list(lane) for lane in cursor]
        return [self._row_once(after, length) for _ in range(rows)], after

    def _row_once(self, after: Cursor, length: int) -> tuple[Span, ...]:
        """One row of the first epoch; moves `after` on."""

        def advance(lane: int) -> tuple[int, int]:
            n, offset = after[lane]
            return n // self.lanes * self.block_tokens + offset, lane

        left = {lane: self._left(*after[lane]) for lane in range(self.lanes)}
        enough = [lane for lane, tokens in left.items() if tokens >= length]
        lanes = [min(enough, key=advance)] if enough else sorted(left, key=advance)
        spans: tuple[Span, ...] = ()
        for lane in lanes:
            part = min(length, left[lane])
            if part:
                n, offset = after[lane]
                taken, n, offset = self._cross(n, offset, part)
                spans, length = spans + taken, length - part
                after[lane] = [n, offset]
        assert length == 0, "more rows were asked for than the epoch has"
        return spans

    def _left(self, n: int, offset: int) -> int:
        """Tokens of the first epoch that are left to the lane that stands at block n."""
        return sum(self._block_span(m)[1] for m in range(n, self.blocks, self.lanes)) - offset

    def rows_left(self, cursor: Cursor, served: int, length: int) -> int:
        """Return how many rows of `length` the first epoch still has after `served` tokens."""
        return (self.tokens - served) // length

    def epochs(self, cursor: Cursor, served: int) -> dict[str, float]:
        """Return by the source's name how many times over it has been served."""
        return {self.name: served / self.tokens}

    def served_in_words(self, served: int, length: int) -> str:
        """What was served, where no row of `length` is left."""
        return f"{served:,} of its {self.tokens:,} tokens served, no further row of {length}"

    def check(self, cursor: Any) -> Cursor:
        """The cursor, if it can be one of this order; else DataError."""
        valid = isinstance(cursor, list) and len(cursor) == self.lanes
        for lane, entry in enumerate(cursor if valid else ()):
            valid = (
                isinstance(entry, list)
                and len(entry) == 2
                and all(type(number) is int and number >= 0 for number in entry)
                and entry[0] % self.lanes == lane
                and entry[1] < self.block_span(entry[0])[1]
            )
            if not valid:
                break
        if not valid:
            raise DataError(
                f"the saved cursor of data.sources.{self.name} does not fit its order "
                f"(lanes={self.lanes}, block_tokens={self.block_tokens}, tokens={self.tokens}). "
                "Resume with the data section and the files of the run that wrote it."
            )
        return [list(entry) for entry in cursor]


def checksum(value: Any) -> int:
    """CRC-32 of a JSON value in its canonical spelling."""
    return zlib.crc32(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())
