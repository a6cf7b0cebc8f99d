"""The console: a live line and a bar on a terminal, plain lines at a calm pace in a log."""

import time
from collections.abc import Callable, Collection
from typing import Any, assert_never

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from megahybrid.ledger import (
    AnnealEvent,
    AttentionEvent,
    ConfigChangeEvent,
    ContextGainEvent,
    DamagedEvent,
    EndEvent,
    EvaluateEvent,
    EventLine,
    ExhaustedEvent,
    GateEvent,
    KernelsEvent,
    ListenerFailedEvent,
    OtherEvent,
    RecomputeEvent,
    RepeatDiffersEvent,
    ResumeEvent,
    RewindEvent,
    SaveEvent,
    SkipEvent,
    StageEvent,
    StartEvent,
    StepLine,
    SuiteEvent,
    WarningEvent,
    bits_per_byte,
)
from megahybrid.train.listeners.base import RunInfo
from megahybrid.train.metrics import TimeLeft


class Console:
    """Prints stage, step, tokens, loss, tokens/s, MFU and the time left.

    On a terminal each step moves a progress bar; elsewhere a plain line is printed at the first
    step of an attempt and of a stage, and then at most every `plain_seconds`. `cost_per_token`
    (stage → FLOPs per token, any unit) makes the time left right across stages.
    """

    essential = False

    def __init__(
        self,
        console: RichConsole | None = None,
        plain_seconds: float | int = 10.0,
        cost_per_token: dict[str, float | int] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or RichConsole(highlight=False)
        self._plain_seconds = plain_seconds
        self._cost_per_token = cost_per_token or {}
        self._now = now
        self._bar: Progress | None = None
        self._printed: float | None = None
        self._stage = ""
        self._total_tokens = 0

    def on_start(self, run: RunInfo) -> None:
        """Says where the run goes on and to what end."""
        self._total_tokens = run.total_tokens
        self._time_left = TimeLeft(
            [(end, self._cost_per_token.get(name, 1.0)) for name, end in run.stages]
        )
        self._time_left.update(run.tokens, self._now())
        verb = f"resumes at step {run.step}" if run.step else "starts"
        self._say(f"{run.name} {verb}: {tokens_text(run.tokens)} of {self._goal()} tokens")
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[line]}"),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                escape(run.stage), total=run.total_tokens, completed=run.tokens, line=""
            )

    def on_step(self, line: StepLine) -> None:
        """Moves the bar, or prints a line when it is time."""
        now = self._now()
        seconds_left = self._time_left.update(line.tokens, now)
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=line.tokens,
                description=escape(line.stage),
                line=self._describe(line, seconds_left, sep="  "),
            )
            return
        due = self._printed is None or now - self._printed >= self._plain_seconds
        if due or line.stage != self._stage or line.tokens >= self._total_tokens or line.skipped:
            self._printed, self._stage = now, line.stage
            tokens = f"{tokens_text(line.tokens)}/{self._goal()}"
            described = self._describe(line, seconds_left, sep=" | ")
            self._say(f"{line.stage} | {tokens} | {described}")

    def on_event(self, line: EventLine) -> None:
        """Prints an event on a line of its own."""
        text = describe_event(line)
        if text:
            self._say(text)

    def on_end(self, outcome: str) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _goal(self) -> str:
        return tokens_text(self._total_tokens)

    def _say(self, text: str) -> None:
        # Wrapping is the terminal's: a log line stays one line.
        self._console.print(escape(text), soft_wrap=True)

    @staticmethod
    def _describe(line: StepLine, seconds_left: float | None, sep: str) -> str:
        loss = "not finite" if line.loss is None else f"{line.loss:.4f}"
        rate = "–" if line.tokens_per_second is None else f"{line.tokens_per_second:,.0f}"
        parts = [
            f"step {line.step}",
            f"loss {loss}{' (update skipped)' if line.skipped else ''}",
            f"lr {line.learning_rate:.2e}",
            f"{rate} tokens/s",
            "MFU –" if line.mfu is None else f"MFU {line.mfu:.1%}",
            f"ETA {duration_text(seconds_left)}",
        ]
        return sep.join(parts)


def describe_event(line: EventLine) -> str | None:
    """Describe an event in a line for a person; None for what the console already shows."""
    place = f"(step {line.step})"
    match line.content:
        case StartEvent() | ResumeEvent() | AttentionEvent():
            return None
        case SuiteEvent() as asked:
            return f"suite {asked.suite}: {', '.join(_scores(asked))} {place}"
        case GateEvent() as gate:
            value = "nothing" if gate.value is None else f"{gate.value:.4g}"
            verdict = "passed" if gate.ok else "NOT passed"
            return f"gate {verdict}: {gate.gate} is {value}, {gate.bound} asked"
        case StageEvent() as stage:
            begins = f"stage {line.stage} begins at step {line.step}"
            return f"{begins} ({tokens_text(line.tokens)} tokens){_kernels(stage)}"
        case EvaluateEvent() as score:
            loss = "–" if score.loss is None else format(score.loss, ".4f")
            rows = "documents up to" if score.rows == "documents" else "at"
            bits = bits_per_byte(score.loss, score.tokens, score.bytes)
            by_byte = "" if bits is None else f" ({bits:.4f} bits per byte)"
            return (
                f"held-out {score.set}: loss {loss}{by_byte} {rows} length {score.length} "
                f"(step {line.step}, {tokens_text(score.tokens)} tokens)"
            )
        case ContextGainEvent() as gain:
            return f"held-out {gain.set}: {_gain(gain)} {place}"
        case SaveEvent(ok=True) as save:
            size = (save.bytes or 0) / 1e6
            return f"saved {save.path} ({size:,.1f} MB, {save.seconds or 0:.1f} s)"
        case RewindEvent() as rewind:
            return (
                f"back to step {line.step}; the data up to step {rewind.from_step} is passed "
                f"over ({rewind.reason})"
            )
        case EndEvent() as end:
            rest = {name: value for name, value in line.detail.items() if name != "outcome"}
            told = f"{end.outcome} at step {line.step}, {tokens_text(line.tokens)} tokens"
            return told + _details(rest)
        case (
            SaveEvent() | SkipEvent() | WarningEvent() | ConfigChangeEvent() | KernelsEvent()
            | RecomputeEvent() | AnnealEvent() | ExhaustedEvent() | RepeatDiffersEvent()
            | ListenerFailedEvent() | OtherEvent() | DamagedEvent()
        ):  # fmt: skip
            return f"{line.event.replace('_', ' ')}{_details(line.detail)} {place}"
        case other:
            assert_never(other)


def _gain(told: ContextGainEvent) -> str:
    """Write the gain with its interval, and of how many documents it is a mean."""
    beyond = f"beyond {told.context:,} tokens"
    if told.gain is None:
        return f"no document has a token {beyond}"
    of = f"{told.documents:,} document{'s' if told.documents != 1 else ''}"
    sure = "" if told.low is None else f", 95 %: {told.low:+.4f} to {told.high:+.4f}"
    return f"context {beyond} is worth {told.gain:+.4f} nats ({of}{sure})"


def _scores(asked: SuiteEvent) -> list[str]:
    """Write each task's share of right answers, or its score, over the lengths asked."""
    return [
        f"{task} {figure} {_span(known)}"
        for task, scores in asked.tasks.items()
        for figure, values in (("exact", scores.exact), ("score", scores.score))
        if (known := [value for value in (values or {}).values() if value is not None])
    ]


def _kernels(stage: StageEvent) -> str:
    chosen = stage.kernels or {}
    kinds = [
        f"{kind} {chosen[kind]}"
        for kind in ("full", "windowed", "blocks", "products")
        if kind in chosen
    ]
    told = f"; kernels: {', '.join(kinds)}" if kinds else ""
    return f"{told}; {chosen['exchange']}" if "exchange" in chosen else told


def _span(values: Collection[float]) -> str:
    """Write one value, or the least and the most."""
    low, high = min(values), max(values)
    return f"{low:.2f}" if low == high else f"{low:.2f}–{high:.2f}"


def tokens_text(tokens: int) -> str:
    """1234 → "1,234"; 1_234_567 → "1.23M"; billions and trillions likewise."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if tokens >= size:
            return f"{tokens / size:.2f}{unit}"
    return f"{tokens:,}"


def duration_text(seconds: float | None) -> str:
    """75 → "1:15"; 3675 → "1:01:15"; two days and more in days; "–" when unknown."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole >= 48 * 3600:
        return f"{whole / 86400:.1f} days"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def _details(detail: dict[str, Any]) -> str:
    texts = []
    for key, value in detail.items():
        if isinstance(value, float):
            texts.append(f"{key} {value:.4g}")
        elif isinstance(value, str | int):
            texts.append(f"{key} {value}")
    return ": " + ", ".join(texts) if texts else ""
