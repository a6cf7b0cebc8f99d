"""Reading the .bin of shards by position.

Not mapped: a mapped file that gets shorter ends the process with a signal and no word, a read tells
how much there was. It costs 0.7 µs more for a row of 16 KiB.
"""

import os
from collections.abc import Callable, Sequence

import numpy as np

from megahybrid.data.token_file import Array, ShardIndex
from megahybrid.errors import DataError

OPEN_FILES = 128  # kept: of file descriptors 1024 are usual
RESTORE = "Restore the file; data must not change under a run."


class _File:
    """A descriptor that is closed when nobody holds it any more, whatever thread that is."""

    def __init__(self, path: os.PathLike[str]) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    # `close` is kept here: when an interpreter ends, a module's own names may be gone first.
    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "descriptor"):
            close(self.descriptor)


class ShardFiles:
    """The .bin files of a dataset, opened when they are needed."""

    def __init__(self, shards: Sequence[ShardIndex]) -> None:
        self._shards = shards
        self._open: dict[int, _File] = {}

    def _file(self, number: int) -> _File:
        found = self._open[number] = _File(self._shards[number].bin_path)
        if len(self._open) > OPEN_FILES:
            self._open.pop(next(iter(self._open)))  # the first opened
        return found

    def read_into(self, number: int, begin: int, data: Array) -> None:
        """Fills `data` with what lies from byte `begin` on of shard `number`. Raises DataError."""
        try:
            file = self._open.get(number) or self._file(number)
            done = os.preadv(file.descriptor, (data,), begin)  # type: ignore[arg-type]
            # A part: more than 2 GiB at once, a network's file system, or the end.
            while done < data.nbytes:
                rest = data.view(np.uint8)[done:]
                more = os.preadv(file.descriptor, (rest,), begin + done)  # type: ignore[arg-type]
                if not more:
                    raise self._too_short(number, begin + done)
                done += more
        except OSError as error:
            raise DataError(
                f"{self._shards[number].bin_path} cannot be read ({error.strerror}). {RESTORE}"
            ).because(error) from None

    def _too_short(self, number: int, end: int) -> DataError:
        shard = self._shards[number]
        return DataError(
            f"{shard.bin_path} ends at byte {end}, not {shard.tokens * shard.dtype.itemsize} as "
            f"when it was opened. {RESTORE}"
        )

    def read(self, number: int, begin: int, size: int) -> Array:
        """Up to `size` bytes from `begin` of shard `number`, fewer only at its end."""
        shard = self._shards[number]
        data = np.empty(min(size, shard.tokens * shard.dtype.itemsize - begin), np.uint8)
        self.read_into(number, begin, data)
        return data
