"""The two kinds of lines of a ledger, `step` and `event`, and their one line of JSON."""

import json
import math
import time
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from megahybrid.config.shape import (
    DEEPEST,
    Count,
    Finite,
    Positive,
    Seconds,
    too_deep,
)
from megahybrid.ledger.events import (
    DamagedEvent,
    Event,
    KnownEvent,
    ResumeEvent,
    RewindEvent,
    StartEvent,
    check_decisive_fields,
    event_of,
)
from megahybrid.ledger.records import from_json, wrong_fields


@dataclass(frozen=True, kw_only=True)
class StepLine:
    """One optimizer step. `tokens` counts the run's tokens through the end of this step."""

    step: Count
    stage: str
    tokens: Count
    length: Positive
    source_tokens: dict[str, Count]
    cursor_crc: Count
    learning_rate: Finite
    loss: Finite | None  # nats per valid target; None when it was not finite
    z_loss: Finite | None = None  # what the z-loss adds to it in training
    gradient_norm: Finite | None  # before clipping
    gradient_norm_by_kind: dict[str, Finite | None] = field(default_factory=dict)
    skipped: bool = False
    tokens_per_second: Finite | None = None
    mfu: Finite | None = None  # share of the device's peak, 0 to 1; None where no peak is known
    memory_gib: Finite | None = None
    seconds: dict[str, Seconds] = field(default_factory=dict)
    attempt: Count = 0  # the writer puts its own
    time_unix: Seconds = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class EventLine:
    """Anything else worth keeping, as it is written: an event's name and its detail.

    `content` is the same as a record of its kind, for whoever computes or decides with it.
    """

    event: str
    step: Count
    stage: str
    tokens: Count
    detail: dict[str, Any] = field(default_factory=dict)
    attempt: Count = 0  # the writer puts its own
    time_unix: Seconds = field(default_factory=time.time)

    @classmethod
    def of(cls, content: KnownEvent, *, step: int, stage: str, tokens: int) -> "EventLine":
        """The line of an event that happened after `step`."""
        return cls(
            event=content.name, step=step, stage=stage, tokens=tokens, detail=content.detail()
        )

    @cached_property
    def content(self) -> Event:
        """The event as a record of its kind."""
        return event_of(self.event, self.detail)

    @property
    def begins(self) -> bool:
        """Return whether an attempt begins here: what earlier ones did beyond its step is void."""
        return self.event in (StartEvent.name, ResumeEvent.name)

    @property
    def goes_back(self) -> bool:
        """Return whether the attempt went back to this step: what was done beyond it is void."""
        return self.event == RewindEvent.name


Line = StepLine | EventLine
_KINDS: dict[str, type[StepLine] | type[EventLine]] = {"step": StepLine, "event": EventLine}


def encode(line: Line) -> bytes:
    """A line of the file, its newline included. Numbers that are not finite are written as null."""
    kind = "step" if isinstance(line, StepLine) else "event"
    record = {"kind": kind, **asdict(line)}
    if isinstance(line, StepLine) and line.z_loss is None:
        del record["z_loss"]
    return (json.dumps(_finite(record), allow_nan=False, separators=(",", ":")) + "\n").encode()


def parse(text: bytes) -> Line:
    """The line of a text without its newline. Raises ValueError, in words, where it is none.

    Fields of a newer version are passed over, so that an older report still reads the run.
    """
    record = json.loads(text)
    if not isinstance(record, dict) or record.get("kind") not in _KINDS:
        raise ValueError("no kind of step or event")
    kind = _KINDS[record["kind"]]
    # Somebody may have edited a line by hand: what is computed with is what it should be.
    wrong = wrong_fields(kind, record)
    if wrong is not None:
        raise ValueError(wrong)
    line = from_json(kind, record)
    if isinstance(line, EventLine):
        check_decisive_fields(line.event, line.detail)
    return line


def damage(line: Line) -> str | None:
    """Return what keeps a page from being drawn of a line, in words; None where nothing does."""
    if isinstance(line, StepLine):
        return None
    if too_deep(line.detail):
        return f"detail: mappings within one another, more than {DEEPEST} deep"
    return line.content.wrong if isinstance(line.content, DamagedEvent) else None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
