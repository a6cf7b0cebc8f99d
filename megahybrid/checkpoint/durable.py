"""Files that are on the disk when we say so, with a checksum for every block.

Every change to the file system that a save makes goes through here, so that a test can stop a save
before and after each one.
"""

import os
import shutil
import threading
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from megahybrid.checkpoint.manifest import BLOCK_BYTES, FileRecord

# Small enough to stay in a core's cache between the read and its checksum.
READ_BYTES = 2**20
CHECKERS = 8  # threads, however few the cores: a disk gives more to several who wait
# As many are given to the disk at a time while later ones are still being written.
WRITE_BACK_BYTES = 2**24


class BlockChecksums:
    """CRC-32 of each block of a stream of bytes that arrives in pieces of any size.

    They are computed on a thread of their own while the bytes are written: both release the
    interpreter's lock. The bytes must not change until `record`.
    """

    def __init__(self, worker: Executor) -> None:
        self.block_bytes = BLOCK_BYTES
        self.bytes = 0
        self._worker = worker
        self._done: list[Future[int]] = []
        self._block: list[memoryview] = []

    def split(self, data: memoryview) -> Iterator[memoryview]:
        """Count `data`, and yield it in pieces that end where blocks end."""
        at = 0
        while at < len(data):
            room = self.block_bytes - self.bytes % self.block_bytes
            piece = data[at : at + room]
            self._block.append(piece)
            self.bytes += len(piece)
            at += len(piece)
            if self.bytes % self.block_bytes == 0:
                self._finish_block()
            yield piece

    def _finish_block(self) -> None:
        self._done.append(self._worker.submit(_checksum, self._block))
        self._block = []

    def record(self) -> FileRecord:
        """The sizes and checksums of all that was counted."""
        if self._block:
            self._finish_block()
        checksums = tuple(each.result() for each in self._done)
        return FileRecord(bytes=self.bytes, block_bytes=self.block_bytes, crc32=checksums)


def _checksum(pieces: Iterable[memoryview]) -> int:
    running = 0
    for piece in pieces:
        running = zlib.crc32(piece, running)
    return running


def write(path: Path, chunks: Iterable[memoryview]) -> FileRecord:
    """Write a new file, wait until it is on the disk, and return its checksums. Raises OSError."""
    with ThreadPoolExecutor(1) as worker:
        checksums = BlockChecksums(worker)
        # Unbuffered: an error belongs to the write that caused it, and a close has nothing left.
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        begun = 0
        try:
            for chunk in chunks:
                for piece in checksums.split(chunk):
                    written = 0
                    while written < len(piece):
                        written += os.write(handle, piece[written:])
                    if checksums.bytes - begun >= WRITE_BACK_BYTES:
                        _begin_write_back(handle, begun, checksums.bytes - begun)
                        begun = checksums.bytes
            os.fsync(handle)
        finally:
            os.close(handle)
        return checksums.record()


def _begin_write_back(handle: int, start: int, count: int) -> None:
    """Have the disk begin with these bytes of a file, and wait for nothing.

    Most of what the final fsync would wait for is then done. Where there is no such call nothing
    happens.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, start, count, os.POSIX_FADV_DONTNEED)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename(old: Path, new: Path) -> None:
    """Give a file or folder its new name, and wait until that is on the disk."""
    os.rename(old, new)
    sync_directory(new.parent)


def remove(path: Path) -> None:
    """Delete a folder with all it holds, or the file or link that stands in its place.

    Nothing happens when it is gone already.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def drop_page_cache(path: Path) -> None:
    """Let the next reading of a file ask the disk, not the memory it was written from."""
    if hasattr(os, "posix_fadvise"):
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def damaged_blocks(path: Path, record: FileRecord, blocks: range | None = None) -> list[int]:
    """The blocks of a file (of `blocks`, or of all) whose checksum is not the recorded one.

    Raises OSError.
    """
    wanted_blocks = range(len(record.crc32)) if blocks is None else blocks
    buffers = threading.local()

    def checksum(block: int) -> int:
        if not hasattr(buffers, "one"):
            buffers.one = memoryview(bytearray(READ_BYTES))
        start = block * record.block_bytes
        wanted = min(record.block_bytes, record.bytes - start)
        running = 0
        while wanted > 0 and (got := os.preadv(handle, [buffers.one[:wanted]], start)):
            running = zlib.crc32(buffers.one[:got], running)
            start += got
            wanted -= got
        return running if wanted == 0 else -1

    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Reads and checksums release the interpreter's lock.
        with ThreadPoolExecutor(CHECKERS) as pool:
            found = zip(wanted_blocks, pool.map(checksum, wanted_blocks), strict=True)
            return [index for index, crc in found if crc != record.crc32[index]]
    finally:
        os.close(handle)
