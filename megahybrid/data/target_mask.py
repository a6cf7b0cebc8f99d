"""`.mask`: which tokens of a shard count as targets, one bit each, the least significant first.

For questions whose answers alone are to be learnt. Token n counts when bit n is set; as an input it
is seen either way.
"""

import zlib
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

    def verify(self) -> None:
        """Raises DataError unless every byte is as it was written."""
        found = zlib.crc32(self._read(0, self._size).data)
        if found != self.crc32:
            raise DataError(
                f"{self.path} has crc32 {found}, not {self.crc32}. Copy this file again."
            )


def mask_bytes(counts: Array) -> bytes:
    """The file for a truth value per token."""
    return np.packbits(counts, bitorder="little").tobytes()
