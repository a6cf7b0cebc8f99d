"""The ledger: what a run did, one JSON object a line, only ever appended to.

It is the truth about a run; plots, trackers and resumes read it. A line is complete when it ends in
a newline. Numbers that are not finite are written as null.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from megahybrid.errors import MegahybridError, StorageError

LEDGER_NAME = "ledger.jsonl"
EVALUATIONS = "evaluations"  # folder of a run: what was asked of its checkpoints, as JSON
# Events that say from which step an attempt went on; what earlier attempts did beyond it is void.
BEGINNINGS = ("start", "resume")
# Says to which step the same attempt went back; what was done beyond it is void too.
REWIND = "rewind"


@dataclass(frozen=True, kw_only=True)
class StepLine:
    """One optimizer step. `tokens` counts the run's tokens through the end of this step."""

    step: int
    stage: str
    tokens: int
    length: int
    source_tokens: dict[str, int]
    cursor_crc: int
    learning_rate: float
    loss: float | None  # nats per valid target; None when it was not finite
    gradient_norm: float | None  # before clipping
    gradient_norm_by_kind: dict[str, float | None] = field(default_factory=dict)
    skipped: bool = False
    tokens_per_second: float | None = None
    mfu: float | None = None  # share of the device's peak, 0 to 1; None where no peak is known
    memory_gib: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    attempt: int = 0  # the writer puts its own
    time_unix: float = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class EventLine:
    """Anything else worth keeping: start, resume, rewind, stage, evaluate, save, skip, end, …"""

    event: str
    step: int
    stage: str
    tokens: int
    detail: dict[str, Any] = field(default_factory=dict)
    attempt: int = 0  # the writer puts its own
    time_unix: float = field(default_factory=time.time)


Line = StepLine | EventLine
_KINDS: dict[str, type[StepLine] | type[EventLine]] = {"step": StepLine, "event": EventLine}
_FIELDS = {kind: {f.name for f in fields(line_type)} for kind, line_type in _KINDS.items()}


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
        line = replace(line, attempt=self.attempt)
        kind = "step" if isinstance(line, StepLine) else "event"
        record = {"kind": kind, **asdict(line)}
        encoded = json.dumps(_finite(record), allow_nan=False, separators=(",", ":")) + "\n"
        self._append(encoded.encode())
        if kind == "event" or time.monotonic() - self._synced >= self.sync_seconds:
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


@dataclass(frozen=True)
class Ledger:
    """The lines of a run that still hold, in the order they were written."""

    lines: tuple[Line, ...]

    @property
    def steps(self) -> list[StepLine]:
        """The step lines."""
        return [line for line in self.lines if isinstance(line, StepLine)]

    @property
    def events(self) -> list[EventLine]:
        """All event lines."""
        return [line for line in self.lines if isinstance(line, EventLine)]

    def named(self, event: str) -> list[EventLine]:
        """The event lines of one name."""
        return [line for line in self.events if line.event == event]


def read_ledger(path: Path) -> Ledger:
    """The lines of a ledger, without what a resume made void.

    Lines of earlier attempts beyond the step of a later start or resume are dropped, and all lines
    beyond the step of a later rewind. A torn last line is ignored; a torn line elsewhere raises
    MegahybridError with its number.
    """
    kept: list[Line] = []
    for line in read_every_line(path):
        if isinstance(line, EventLine) and line.event in BEGINNINGS:
            kept = [old for old in kept if old.attempt >= line.attempt or old.step <= line.step]
        elif isinstance(line, EventLine) and line.event == REWIND:
            kept = [old for old in kept if old.step <= line.step]
        kept.append(line)
    return Ledger(tuple(kept))


def read_every_line(path: Path) -> Iterator[Line]:
    """Every complete line of a ledger, of all attempts, in the order they were written."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MegahybridError(
            f"{path} could not be read ({error.strerror}). Name the directory of a run."
        ).because(error) from error
    texts = content.split(b"\n")
    # The piece after the last newline is empty, or a line that was never finished.
    for number, text in enumerate(texts[:-1], start=1):
        try:
            yield _parse(text)
        except (ValueError, TypeError) as error:
            if number == len(texts) - 1 and not texts[-1]:
                return
            raise MegahybridError(
                f"{path}:{number} is not a ledger line ({error}). "
                "Only the last line may be torn; restore the file or remove this line."
            ) from error


def _parse(text: bytes) -> Line:
    record = json.loads(text)
    if not isinstance(record, dict) or record.get("kind") not in _KINDS:
        raise ValueError("no kind of step or event")
    kind = record["kind"]
    # Fields of a newer version are left out, so that an older report still reads the run.
    return _KINDS[kind](**{key: record[key] for key in record.keys() & _FIELDS[kind]})


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
                return end, _parse(piece[begin:])
        end = start + begin
    if end == 0:
        return 0, None
    raise MegahybridError(
        f"{path} does not end in a ledger line. Only its last line may be torn; restore or move it."
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
