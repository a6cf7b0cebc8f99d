"""The protocol of a listener, and `Listeners`, which calls several and survives their failures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from megahybrid.ledger import (
    EndEvent,
    EventLine,
    KnownEvent,
    ListenerFailedEvent,
    ResumeEvent,
    RewindEvent,
    RunFacts,
    StartEvent,
    StepLine,
)


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """The run when an attempt begins; `step` and `tokens` are where it goes on from."""

    name: str
    directory: Path
    config: dict[str, Any]  # the resolved run file, as plain values
    step: int
    stage: str
    tokens: int
    stages: tuple[tuple[str, int], ...]  # name, and the run's tokens at its end
    facts: RunFacts = field(default_factory=RunFacts)

    @property
    def total_tokens(self) -> int:
        """Tokens at the end of the plan."""
        return self.stages[-1][1]


@runtime_checkable
class Listener(Protocol):
    """Called with everything in order, on the trainer's thread, on rank 0; must return at once."""

    essential: bool  # True: its failure ends the run. False: it is dropped and the run goes on.

    def on_start(self, run: RunInfo) -> None:
        """An attempt begins."""

    def on_step(self, line: StepLine) -> None:
        """An optimizer step is done."""

    def on_event(self, line: EventLine) -> None:
        """Anything else happened; see `megahybrid.ledger.events`."""

    def on_end(self, outcome: str) -> None:
        """The attempt ends: "done", "stopped" or "failed". Nothing follows."""


class ListenerFailed(Exception):
    """Raised by a listener that cannot go on; its text says why, in one line."""


class Listeners:
    """Tells several listeners, in their order. The trainer calls its methods on rank 0.

    The step, stage and tokens of an event are those of the last step, unless said otherwise. A
    listener that is not essential and raises is dropped, and the others hear one event
    `listener_failed` with its name and reason.
    """

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = list(listeners)
        self._step, self._stage, self._tokens = 0, "", 0
        self.began = False  # whether a step of this attempt is done; known on every rank

    def on_start(self, run: RunInfo) -> None:
        """Begins an attempt and tells everyone `start`, or `resume` when it goes on."""
        self._step, self._stage, self._tokens = run.step, run.stage, run.tokens
        for listener in self._each():
            self._tell(listener, listener.on_start, run)
        begins = ResumeEvent if run.step else StartEvent
        self.on_event(begins(**vars(run.facts)))

    def on_step(self, line: StepLine) -> None:
        """Tells everyone of a step."""
        self._step, self._stage, self._tokens = line.step, line.stage, line.tokens
        self.began = True
        for listener in self._each():
            self._tell(listener, listener.on_step, line)

    def on_event(self, event: KnownEvent, *, stage: str | None = None) -> None:
        """Tells everyone of an event; `stage` says that another stage has begun."""
        if stage is not None:
            self._stage = stage
        line = EventLine.of(event, step=self._step, stage=self._stage, tokens=self._tokens)
        for listener in self._each():
            self._tell(listener, listener.on_event, line)

    def on_rewind(self, step: int, stage: str, tokens: int, event: RewindEvent) -> None:
        """Tells everyone that the run went back to `step`."""
        self._step, self._stage, self._tokens = step, stage, tokens
        self.on_event(event)

    def on_end(self, outcome: str, *, error: str | None = None) -> None:
        """Ends the attempt: "done", "stopped" or "failed". The essential listeners end last, so
        that they hear of the others' failures."""
        self.on_event(EndEvent(outcome=outcome, error=error))
        for listener in sorted(self._listeners, key=lambda one: one.essential):
            self._tell(listener, listener.on_end, outcome)
        self._listeners.clear()

    def _each(self) -> Iterator[Listener]:
        for listener in tuple(self._listeners):
            if listener in self._listeners:  # one that failed meanwhile hears nothing more
                yield listener

    def _tell(self, listener: Listener, method: Any, *told: Any) -> None:
        try:
            method(*told)
        except Exception as error:
            if listener.essential:
                raise
            self._listeners.remove(listener)
            reason = str(error) if isinstance(error, ListenerFailed) else repr(error)
            name = type(listener).__name__
            self.on_event(ListenerFailedEvent(listener=name, reason=reason.splitlines()[0]))
