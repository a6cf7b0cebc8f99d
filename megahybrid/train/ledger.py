"""The ledger: what a run did, one JSON object a line, only ever appended to.

It is the truth about a run; plots, trackers and resumes read it. A line is complete when it ends in
a newline. Numbers that are not finite are written as null.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from megahybrid.errors import MegahybridError, StorageError
from megahybrid.printable import shortened

LEDGER_NAME = "ledger.jsonl"
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
        except (ValueError, TypeError, RecursionError) as error:
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
    known = {key: record[key] for key in record.keys() & _FIELDS[kind]}
    for name, value in known.items():
        if not _IS[name](value):
            raise ValueError(f"{name}={shortened(json.dumps(value))} is not {_WANTED[_IS[name]]}")
    line = _KINDS[kind](**known)
    if isinstance(line, EventLine):
        _check_detail(line)
    return line


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_number_or_null(value: Any) -> bool:
    return value is None or _is_number(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_count, value.values()))


def _is_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number_or_null, value.values()))


_WANTED: dict[Callable[[Any], bool], str] = {
    _is_count: "a count",
    _is_number: "a number",
    _is_number_or_null: "a number or null",
    _is_text: "text",
    _is_flag: "true or false",
    _is_object: "an object",
    _is_counts: "an object of counts",
    _is_numbers: "an object of numbers",
}
# Somebody may have edited a line by hand: what is computed with is what it should be.
_IS: dict[str, Callable[[Any], bool]] = (
    dict.fromkeys(("step", "tokens", "length", "cursor_crc", "attempt"), _is_count)
    | dict.fromkeys(("stage", "event"), _is_text)
    | dict.fromkeys(("learning_rate", "time_unix"), _is_number)
    | dict.fromkeys(
        ("loss", "gradient_norm", "tokens_per_second", "mfu", "memory_gib"), _is_number_or_null
    )
    | dict.fromkeys(("gradient_norm_by_kind", "seconds"), _is_numbers)
    | {"source_tokens": _is_counts, "skipped": _is_flag, "detail": _is_object}
)
# Of events that decide how a run goes on.
_DETAILS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "evaluate": {"set": _is_text, "loss": _is_number_or_null},
    "suite": {"suite": _is_text},
    REWIND: {"data": _is_object},
}


def _check_detail(line: EventLine) -> None:
    for name, right in _DETAILS.get(line.event, {}).items():
        if name in line.detail and not right(line.detail[name]):
            raise ValueError(f"detail.{name} of event {line.event} is not {_WANTED[right]}")


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
