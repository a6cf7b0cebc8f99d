"""The events of the ledger: a frozen record for each kind of event.

A record's fields are those of the line's `detail`, in the order in which they are written; one with
None as its default is left out where it is None. Who reads an event decides with `match` over
`Event`, so that the type checker names the places that a new kind must be added to.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from megahybrid.config.shape import Count, Positive
from megahybrid.ledger.records import from_json, to_json, wrong_fields

Number = float | None  # None, NaN and infinities are gaps


@dataclass(frozen=True, kw_only=True)
class Record:
    """The base of all kinds of events."""

    name: ClassVar[str]
    # Fields that decide how a run goes on: a line in which one is wrong cannot be read.
    decides: ClassVar[tuple[str, ...]] = ()
    # A page draws or computes with its fields: it is not made of ones that are wrong.
    drawn: ClassVar[bool] = False

    def detail(self) -> dict[str, Any]:
        """The event's fields as its line holds them."""
        found: dict[str, Any] = to_json(self)
        return found

    @classmethod
    def fields_of(cls, detail: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the record's fields by name, of a line's detail: the inverse of `detail`."""
        return detail


@dataclass(frozen=True, kw_only=True)
class Parent:
    """The checkpoint that a run branched off, and what it took of it."""

    checkpoint: str
    step: Count | None = None
    tokens: Count | None = None
    take: str


@dataclass(frozen=True, kw_only=True)
class RunFacts(Record):
    """The machine and software of an attempt, told when it begins. `parent` stays as it was read: a
    page is drawn whatever it is; `branched_from` reads it."""

    world_size: Count | None = None
    tensor: Any = None
    context: Any = None  # where ranks share rows
    data: Any = None
    zero_stage: Any = None
    precision: Any = None
    device: str | None = None
    megahybrid: Any = None  # its version
    torch: Any = None
    python: Any = None
    model: Any = None  # its fingerprint
    kernels: Any = None  # by the kind of layer or piece that each computes
    parent: Any = None

    drawn: ClassVar[bool] = True

    def branched_from(self) -> Parent | None:
        """The parent of a branch. Raises ValueError, in words, where it is no such thing."""
        if self.parent is None:
            return None
        wrong = wrong_fields(Parent, self.parent)
        if wrong is not None:
            raise ValueError(f"parent.{wrong}")
        return from_json(Parent, self.parent)


class StartEvent(RunFacts):
    """An attempt begins at the run's first step."""

    name = "start"


class ResumeEvent(RunFacts):
    """An attempt goes on from a checkpoint."""

    name = "resume"


@dataclass(frozen=True, kw_only=True)
class ConfigChangeEvent(Record):
    """A field of the run file differs from what the run began with, as it was allowed to."""

    name = "config_change"
    field: str  # its dotted name
    before: str
    now: str


@dataclass(frozen=True, kw_only=True)
class StageEvent(Record):
    """A stage begins, or goes on in a new attempt. `repeatable`: digests of what decides its data
    and arithmetic, by which steps that are done again are compared."""

    name = "stage"
    index: Count | None = None
    kernels: dict[str, str] | None = None
    self_test_seconds: Number = None
    repeatable: Any = None


@dataclass(frozen=True, kw_only=True)
class KernelsEvent(Record):
    """The measurements of each kind of kernel at a length, in words."""

    name = "kernels"
    length: Positive
    full: str | None = None
    windowed: str | None = None
    products: str | None = None
    blocks: str | None = None


@dataclass(frozen=True, kw_only=True)
class RecomputeEvent(Record):
    """The outcome of a memory budget: the policy of each layer, and how many have each."""

    name = "recompute"
    layers: str
    policies: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class AnnealEvent(Record):
    """Fields of schemes that changed within a stage, by dotted name: `local.window` is 640 now."""

    name = "anneal"
    changes: dict[str, Any]
    self_test_seconds: Number = None

    def detail(self) -> dict[str, Any]:
        """The changes stand side by side with the seconds."""
        return self.changes | {"self_test_seconds": self.self_test_seconds}

    @classmethod
    def fields_of(cls, detail: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the changes apart from the seconds."""
        changes = dict(detail)
        seconds = changes.pop("self_test_seconds", None)
        return {"changes": changes, "self_test_seconds": seconds}


@dataclass(frozen=True)
class PositionBucket:
    """Targets whose input token stands at document positions [start, stop)."""

    start: Count
    stop: Positive
    tokens: Count
    loss: Number  # nats per token; None where no token fell into the bucket


@dataclass(frozen=True)
class TurnLoss:
    """Targets in one of the assistant's turns, from 1 on; the last stands for all later ones."""

    turn: Positive
    tokens: Count
    loss: Number  # nats per token


@dataclass(frozen=True, kw_only=True)
class EvaluateEvent(Record):
    """The loss on one held-out set."""

    name = "evaluate"
    drawn = True
    decides = ("set", "loss")
    set: str
    stage: str | None = None
    step: Any = None
    # stream: the whole file cut at `length`; documents: each row within one document
    rows: str | None = None
    loss: Number  # nats per token; None for a set without a single target
    tokens: Count
    length: Positive
    by_position: tuple[PositionBucket, ...] = ()
    by_turn: tuple[TurnLoss, ...] | None = None  # of documents of conversations


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """The scores of one task of a suite: figures by length, or by RULER's task, or a
    chat's turn, and length."""

    kind: str
    exact: dict[str, Number] | None = None
    token_accuracy: dict[str, Number] | None = None
    score: dict[str, Number] | None = None

    def figures(self) -> dict[str, dict[str, Number]]:
        """The figures that the task has, by their names."""
        found = {"exact": self.exact, "token_accuracy": self.token_accuracy, "score": self.score}
        return {name: scores for name, scores in found.items() if scores is not None}


@dataclass(frozen=True, kw_only=True)
class SuiteEvent(Record):
    """A suite was asked while the model trained; `path` is the file with all of it."""

    name = "suite"
    decides = ("suite",)
    suite: str
    seconds: Number = None
    tasks: dict[str, TaskScores]
    path: str | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionFigures:
    """The targets of attention of a kind of layer, averaged over its heads."""

    mass: dict[str, Number] | None = None  # share of each segment
    entropy_bits: Number = None
    max_logit: Number = None
    distance: Number = None  # tokens
    sink: Number = None
    logit_by_lag: tuple[Number, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionEvent(Record):
    """The targets of the heads in the last tokens of one training row. `layers` and `lag_edges` are
    kept for whoever draws them; nothing here computes with them."""

    name = "attention"
    drawn = True
    tokens: Any = None
    queries: Count | None = None
    lag_edges: Any = None
    by_kind: dict[str, AttentionFigures]
    layers: Any = None
    seconds: Any = None


@dataclass(frozen=True, kw_only=True)
class GateEvent(Record):
    """A stage's gate was judged: what, its value, the bound in words, and whether it is kept."""

    name = "gate"
    drawn = True
    gate: str
    value: Number
    bound: str
    ok: bool


@dataclass(frozen=True, kw_only=True)
class SaveEvent(Record):
    """The outcome of a save; see `checkpoint.writer.SaveResult`."""

    name = "save"
    ok: bool
    saved_step: Count | None = None
    bytes: Count | None = None
    seconds: Number = None
    checked_seconds: Number = None
    stall_seconds: Number = None
    path: str | None = None
    removed: tuple[str, ...] | None = None
    error: str | None = None
    warning: str | None = None


@dataclass(frozen=True, kw_only=True)
class SkipEvent(Record):
    """An update was not made, for a reason; so many in a row."""

    name = "skip"
    reason: str
    in_a_row: Count | None = None


@dataclass(frozen=True, kw_only=True)
class RewindEvent(Record):
    """The attempt went back to the line's step, and on from `data`: cursors after the spike."""

    name = "rewind"
    decides = ("data",)
    from_step: Count | None = None
    reason: str | None = None
    times: Count | None = None
    data: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class ExhaustedEvent(Record):
    """A source has been read to its end, `epochs` times by now."""

    name = "exhausted"
    source: str
    epochs: Number


@dataclass(frozen=True, kw_only=True)
class RepeatDiffersEvent(Record):
    """A step that was done again came out otherwise than in an earlier attempt."""

    name = "repeat_differs"
    step: Count
    attempt: Count
    field: str
    before: Number
    now: Number
    bound: Number = None


@dataclass(frozen=True, kw_only=True)
class WarningEvent(Record):
    """Something that a person should look at; the run goes on."""

    name = "warning"
    message: str


@dataclass(frozen=True, kw_only=True)
class ListenerFailedEvent(Record):
    """A listener that the run can do without failed, and hears nothing more."""

    name = "listener_failed"
    listener: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class EndEvent(Record):
    """The attempt ended: done, stopped or failed, with the error of a failure."""

    name = "end"
    drawn = True
    outcome: str | None = None
    error: Any = None


@dataclass(frozen=True)
class OtherEvent:
    """An event that this version does not know, or not with these fields: it is kept as it is."""

    name: str


@dataclass(frozen=True)
class DamagedEvent:
    """An event that a page cannot be drawn from, and what is wrong with it, in words."""

    name: str
    wrong: str


KnownEvent = (
    StartEvent | ResumeEvent | ConfigChangeEvent | StageEvent | KernelsEvent | RecomputeEvent
    | AnnealEvent | EvaluateEvent | SuiteEvent | AttentionEvent | GateEvent | SaveEvent | SkipEvent
    | RewindEvent | ExhaustedEvent | RepeatDiffersEvent | WarningEvent | ListenerFailedEvent
    | EndEvent
)  # fmt: skip
Event = KnownEvent | OtherEvent | DamagedEvent
EventSink = Callable[[KnownEvent], object]
KINDS: dict[str, type[KnownEvent]] = {kind.name: kind for kind in get_args(KnownEvent)}


def check_decisive_fields(name: str, detail: Mapping[str, Any]) -> None:
    """Raise ValueError where a field of an event that decides how a run goes on is wrong."""
    kind = KINDS.get(name)
    if kind is not None and kind.decides:
        wrong = wrong_fields(kind, detail, *kind.decides)
        if wrong is not None:
            raise ValueError(f"event {name}: detail.{wrong}")


def event_of(name: str, detail: Mapping[str, Any]) -> Event:
    """The event of a line, by its name and detail."""
    kind = KINDS.get(name)
    if kind is None:
        return OtherEvent(name)
    fields = kind.fields_of(detail)
    wrong = wrong_fields(kind, fields)
    if wrong is None:
        return from_json(kind, fields)
    return DamagedEvent(name, wrong) if kind.drawn else OtherEvent(name)
