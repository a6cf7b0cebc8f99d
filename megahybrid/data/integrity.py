"""Noticing that files are damaged, or are not the ones that were opened."""

import os
import random
import zlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from megahybrid.data.manifest import Manifest
from megahybrid.data.shard_files import RESTORE
from megahybrid.data.token_file import Array, ShardIndex, file_facts
from megahybrid.errors import DataError

TRIED_BLOCKS = 4  # checksums tried at open: 64 MiB, some 50 ms
# While reading, one block is checked for every CHECKED_SHARE blocks' worth of tokens that is
# served: about a tenth of the time that serving takes, which happens on a thread of its own.
CHECKED_SHARE = 16
ENDS_BYTES = 2**16


class UnchangedFiles:
    """Size, time of change and inode of every file, as they were at open."""

    def __init__(self, shards: Sequence[ShardIndex]) -> None:
        self._paths = [(shard.bin_path, shard.idx_path) for shard in shards]
        self._facts = [shard.facts for shard in shards]

    def check(self, number: int) -> None:
        """Raises DataError when a file of shard `number` is another than at open."""
        for path, before in zip(self._paths[number], self._facts[number], strict=True):
            after = file_facts(path)
            if after == before:
                continue
            if after[0] != before[0]:
                what = f"has {after[0]} bytes, not {before[0]}"
            elif after[1] != before[1]:
                what = f"was changed at {_time(after[1])}, not {_time(before[1])}"
            else:
                what = f"is another file (inode {after[2]}, not {before[2]})"
            raise DataError(f"{path} {what} as when it was opened. {RESTORE}")


class BlockChecks:
    """Checksums of the manifest, tried on a few blocks at open and on others while reading.

    Which blocks are tried is drawn anew each time, so that many opens see many blocks.
    """

    def __init__(
        self,
        shards: Sequence[ShardIndex],
        manifest: Manifest | None,
        read: Callable[[int, int, int], Array],
    ) -> None:
        """`read` gives bytes of a shard by its number, the first byte and how many."""
        self._shards, self._read = shards, read
        self._entries = manifest.shards if manifest else ()
        self._seen: set[tuple[int, int]] = set()
        self._every = 0
        self.tokens_until_check: float = float(
            "inf"
        )  # tokens to serve until the next block is checked
        if self._entries:
            entry = self._entries[0]
            self._every = CHECKED_SHARE * entry.block_bytes // shards[0].dtype.itemsize
            self.tokens_until_check = self._every

    def check_random_blocks(self) -> None:
        """Checks TRIED_BLOCKS blocks, drawn by chance."""
        draw = random.SystemRandom()
        for _ in range(TRIED_BLOCKS if self._entries else 0):
            number = draw.randrange(len(self._entries))
            self.check(number, draw.randrange(self._shards[number].tokens))

    def check(self, number: int, token: int) -> None:
        """Checks the block of shard `number` that holds `token`, once. Raises DataError."""
        self.tokens_until_check = self._every
        entry = self._entries[number]
        block = token * self._shards[number].dtype.itemsize // entry.block_bytes
        if (number, block) in self._seen:
            return
        begin = block * entry.block_bytes
        data = self._read(number, begin, entry.block_bytes)
        check_block(self._shards[number].bin_path, block, begin, data, entry.crc32[block])
        self._seen.add((number, block))


def check_block(path: Path, block: int, begin: int, data: Array, crc32: int) -> None:
    """Raises DataError unless the block's bytes have this checksum."""
    found = zlib.crc32(data.data)
    if found != crc32:
        raise DataError(
            f"{path} block {block} (bytes from {begin}) has crc32 {found}, not {crc32}. "
            "Copy this file again."
        )


def ends_crc(path: Path) -> int:
    """CRC-32 of the first and the last ENDS_BYTES: cheap, and seldom equal for two files."""
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        crc = zlib.crc32(file.read(ENDS_BYTES))
        file.seek(max(0, size - ENDS_BYTES))
        return zlib.crc32(file.read(ENDS_BYTES), crc)


def _time(nanoseconds: int) -> str:
    return datetime.fromtimestamp(nanoseconds / 1e9, UTC).isoformat(timespec="milliseconds")
