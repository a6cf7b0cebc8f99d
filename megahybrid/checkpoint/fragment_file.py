"""One file of a checkpoint, open for reading: safetensors checks its table, we read the bytes.

They go straight to where they are wanted; through safetensors' slices a value is copied twice more.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megahybrid.checkpoint.fragments import Array
from megahybrid.checkpoint.manifest import ELEMENT_BYTES, FragmentRecord
from megahybrid.errors import CheckpointError

READERS = min(4, os.cpu_count() or 1)
CHUNK_BYTES = 2**21


class FragmentFile:
    """One open file.

    Raises CheckpointError, in one line, for whatever is not as the manifest says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = -1
        try:
            # It refuses tables that overlap, leave holes or leave the file.
            with safe_open(str(path), framework="np"):
                pass
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            length = int.from_bytes(os.pread(self._handle, 8, 0), "little")
            self._table: dict[str, Any] = json.loads(os.pread(self._handle, length, 8))
            self._data = 8 + length
        except (SafetensorError, OSError, ValueError) as error:
            self.close()
            damaged = CheckpointError(f"{path} is damaged ({error}). Use another step's folder.")
            raise (damaged.because(error) if isinstance(error, OSError) else damaged) from None

    def check(self, part: FragmentRecord) -> int:
        """Return where a fragment's data begins in the file.

        It is proven to be what the manifest says.
        """
        wanted = [part.flat[1] - part.flat[0]]
        entry = self._table.get(part.key)
        if entry is None:
            raise CheckpointError(
                f"{self.path} has no {part.key!r}, which the manifest lists. "
                "Use another step's folder."
            )
        if entry["shape"] != wanted or entry["dtype"] != "F32":
            raise CheckpointError(
                f"{self.path}: {part.key!r} is {entry['dtype']} {entry['shape']}, not the F32 "
                f"{wanted} of the manifest. Use another step's folder."
            )
        return self._data + entry["data_offsets"][0]

    def read(self, part: FragmentRecord, start: int, out: Array) -> None:
        """Fill `out` (flat, contiguous) with a fragment's data from element `start` on."""
        at = self.check(part) + start * ELEMENT_BYTES
        wanted = out.data.cast("B")
        if len(wanted) < 2 * CHUNK_BYTES:
            self._fill(part, at, wanted)
            return
        # What is in memory already comes as fast as it is copied: one core would be the limit.
        with ThreadPoolExecutor(READERS) as readers:
            chunks = range(0, len(wanted), CHUNK_BYTES)
            done = [
                readers.submit(self._fill, part, at + low, wanted[low : low + CHUNK_BYTES])
                for low in chunks
            ]
            for each in done:
                each.result()

    def _fill(self, part: FragmentRecord, at: int, rest: memoryview) -> None:
        while rest:
            try:
                got = os.preadv(self._handle, [rest], at)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path} cannot be read ({error.strerror}). Use another step's folder."
                ).because(error) from None
            if got == 0:
                raise CheckpointError(
                    f"{self.path} ends within {part.key!r}. Use another step's folder."
                )
            rest, at = rest[got:], at + got

    def close(self) -> None:
        """Let go of the file."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
