"""Writing the ledger: each line is handed to the system whole, under the attempt's number."""

import contextlib
import os
import time
from dataclasses import replace
from pathlib import Path

from megahybrid.errors import MegahybridError, StorageError
from megahybrid.ledger import Line, StepLine, encode, parse


class LedgerWriter:
    """Appends lines to `path` as one attempt: the number after the last attempt in the file.

    Each line is handed to the system in one write, so a killed process leaves whole lines. Events
    are forced to disk at once, steps at most every `sync_seconds`: a machine that loses power
    loses no more than that of step lines. A torn last line of an earlier attempt is cut off.
    """

    def __init__(self, path: Path, sync_seconds: float | int = 10.0) -> None:
        self.path = path
        self.sync_seconds = sync_seconds
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        complete, last = _last_line(self._file, path)
        os.ftruncate(self._file, complete)
        self.attempt = 1 + (last.attempt if last else 0)
        self._synced = time.monotonic()

    def write(self, line: Line) -> None:
        """Appends one line under this attempt. Raises MegahybridError when it cannot be stored."""
        self._append(encode(replace(line, attempt=self.attempt)))
        due = time.monotonic() - self._synced >= self.sync_seconds
        if due or not isinstance(line, StepLine):
            self.sync()

    def sync(self) -> None:
        """Forces what was written to disk."""
        os.fsync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Syncs and closes; closing twice is harmless."""
        if self._file >= 0:
            self.sync()
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> "LedgerWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, encoded: bytes) -> None:
        before = os.fstat(self._file).st_size
        try:
            rest = memoryview(encoded)
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            # Half a line in the middle of the file would make the whole ledger unreadable. Where
            # that is refused as well it is the last one, which the next attempt cuts off.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, before)
            raise StorageError(
                f"{self.path} could not be written ({error.strerror}). "
                "Make room there, then give the same command again: it resumes."
            ) from error


def _last_line(file: int, path: Path) -> tuple[int, Line | None]:
    """Length of the file up to the end of its last whole line, and that line."""
    end = os.fstat(file).st_size
    for _ in range(2):  # the last line may be torn, the one before it may not
        if end == 0:
            return 0, None
        start, piece = end, b""
        while start > 0 and b"\n" not in piece[:-1]:
            start = max(0, start - 65536)
            piece = os.pread(file, end - start, start)
        begin = piece[:-1].rfind(b"\n") + 1
        if piece.endswith(b"\n"):
            with contextlib.suppress(ValueError, TypeError):
                return end, parse(piece[begin:])
        end = start + begin
    if end == 0:
        return 0, None
    raise MegahybridError(
        f"{path} does not end in a ledger line. Only its last line may be torn; restore or move it."
    )
