"""`.mask`: which tokens of a shard count as targets, one bit each, the least significant first.

For questions whose answers alone are to be learnt. Token n counts when bit n is set; as an input it
is seen either way.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megahybrid.data.shard_files import RESTORE
from megahybrid.data.token_file import Array, ShardIndex, file_facts
from megahybrid.errors import DataError


def mask_path(shard: ShardIndex) -> Path:
    """Return the path of a shard's mask, if it has one."""
    return shard.bin_path.with_suffix(".mask")


class TargetMask:
    """The mask of one shard. Raises DataError where its size is not the shard's."""

    def __init__(self, shard: ShardIndex, crc32: int) -> None:
        self.path, self.crc32 = mask_path(shard), crc32
        expected = -(-shard.tokens // 8)
        found = file_facts(self.path)[0]
        if found != expected:
            raise DataError(
                f"{self.path} has {found} bytes, not {expected} (a bit for each of {shard.tokens} "
                "tokens). Copy or prepare the data again."
            )
        self._size = expected

    def uncounted(self, start: int, length: int) -> Array:
        """Offsets from `start` of the tokens, of `length`, that do not count."""
        first = start // 8
        raw = self._read(first, -(-(start + length) // 8) - first)
        bits = np.unpackbits(raw, bitorder="little")
        return np.flatnonzero(bits[start - 8 * first :][:length] == 0)

    def _read(self, begin: int, size: int) -> Array:
        # Read and not mapped: a map ends the process when the file gets shorter.
        found = np.fromfile(self.path, np.uint8, size, offset=begin)
        if len(found) != size:
            raise DataError(
                f"{self.path} ends at byte {begin + len(found)}, not {self._size} as when it was "
                f"opened. {RESTORE}"
            )
        return found

    def counted(self) -> int:
        """How many tokens of the shard count as targets."""
        step = 2**20
        parts = (self._read(at, min(step, self._size - at)) for at in range(0, self._size, step))
        return sum(int(np.bitwise_count(part).sum()) for part in parts)

    def verify(self) -> None:
        """Raises DataError unless every byte is as it was written."""
        found = zlib.crc32(self._read(0, self._size).data)
        if found != self.crc32:
            raise DataError(
                f"{self.path} has crc32 {found}, not {self.crc32}. Copy this file again."
            )


class MaskBits:
    """The mask of a shard while it is written: a bit per token, so that long shards are cheap."""

    def __init__(self) -> None:
        self._whole = bytearray()
        self._rest = np.zeros(0, bool)  # fewer than eight tokens, of the byte that is not full
        self._all = 0  # tokens so far, while all of them count

    def add(self, tokens: int, counts: Array | None) -> None:
        """Enter which of the tokens just written count as targets; None: all."""
        if counts is None and not self._said():
            self._all += tokens
            return
        for part in self._ones():
            self._append(part)
        self._append(np.ones(tokens, bool) if counts is None else np.asarray(counts, bool))

    def finish(self) -> bytes | None:
        """The bytes of the file; None where every token counts, and no file is needed."""
        if not self._said():
            return None
        return bytes(self._whole) + np.packbits(self._rest, bitorder="little").tobytes()

    def _said(self) -> bool:
        return bool(self._whole) or bool(len(self._rest))

    def _ones(self) -> Iterator[Array]:
        while self._all:
            size = min(self._all, 2**20)
            self._all -= size
            yield np.ones(size, bool)

    def _append(self, counts: Array) -> None:
        bits = np.concatenate((self._rest, counts))
        full = len(bits) // 8 * 8
        self._whole += np.packbits(bits[:full], bitorder="little").tobytes()
        self._rest = bits[full:]
