"""The run in a few sentences and a few large numbers: what a new reader should know first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megahybrid.config import RunConfig
from megahybrid.config.counting import parameters
from megahybrid.ledger import (
    ConfigChangeEvent,
    EndEvent,
    EventLine,
    ExhaustedEvent,
    GateEvent,
    Line,
    ListenerFailedEvent,
    ResumeEvent,
    RewindEvent,
    SaveEvent,
    SkipEvent,
    StartEvent,
    WarningEvent,
)
from megahybrid.report.evaluation_files import EvaluationFile
from megahybrid.report.gain_charts import gain_in_words, newest_gains
from megahybrid.report.model_strip import scheme_in_words
from megahybrid.report.parts import Cell, Table, short_number
from megahybrid.report.position_charts import loss_at
from megahybrid.report.record import Evaluation, RunRecord
from megahybrid.report.statistics import needle_rate

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# Events that a reader of faults wants to see; saving and scoring are the ordinary course.
FAULTS = {
    kind.name
    for kind in (
        SkipEvent, WarningEvent, ListenerFailedEvent, RewindEvent, ExhaustedEvent, ConfigChangeEvent
    )
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A large number with what it is."""

    value: str
    what: str
    note: str = ""


@dataclass(frozen=True)
class Sentence:
    """A sentence of the summary; `subject` are its first words, in bold."""

    text: str
    subject: str = ""


def sentences(record: RunRecord, results: Sequence[EvaluationFile]) -> list[Sentence]:
    """Describe the model, its training and what came out, each in a sentence or two."""
    told = []
    if record.config:
        told.append(Sentence(_model(record.config), record.name))
    told.append(Sentence(_training(record)))
    told.append(Sentence(_outcome(record, results)))
    return [one for one in told if one.text]


def _model(run: RunConfig) -> str:
    names = run.model.layer_plan.names()
    plan = run.plan_at(len(run.stages) - 1)
    kinds = []
    for kind, scheme in plan.schemes.items():
        count = names.count(kind)
        words = scheme_in_words(scheme)
        if count:
            sees = words if count == 1 else words.replace("sees", "see", 1)
            kinds.append(f"{_count(count)} ({kind}) {sees}")
    return (
        f"is a language model of {short_number(parameters(run.model))} "
        f"parameters in {_count(len(names))} layers: {'; '.join(kinds)}."
    )


def _count(number: int) -> str:
    return NUMBERS[number] if number < len(NUMBERS) else f"{number:,}"


def _training(record: RunRecord) -> str:
    steps, stages = record.steps, record.stages
    lengths = [length for stage in stages for length in stage.lengths]
    begun = record.ledger.of(StartEvent) + record.ledger.of(ResumeEvent)
    where = ""
    if begun and begun[-1][0].detail:
        _, facts = begun[-1]
        ranks = 1 if facts.world_size is None else facts.world_size
        where = f" on {ranks} rank{'s' if ranks != 1 else ''} ({facts.device or '?'})"
    span = f"rows of {min(lengths):,} tokens"
    if min(lengths) != max(lengths):
        span = f"the text it sees at once growing from {min(lengths):,} to {max(lengths):,} tokens"
    seconds = sum(sum(line.seconds.values()) for line in steps)
    return (
        f"It has learnt from {short_number(steps[-1].tokens)} tokens in {_count(len(stages))} "
        f"stage{'s' if len(stages) > 1 else ''}, {span}: {steps[-1].step:,} steps in "
        f"{duration(seconds)}{where}. {state(record)}"
    )


def state(record: RunRecord) -> str:
    """Say in words whether the run is done, and how often it was interrupted."""
    last = record.ledger.lines[-1]
    attempts = max(line.attempt for line in record.ledger.lines)
    ends = [end for line, end in record.ledger.of(EndEvent) if line.attempt == last.attempt]
    outcome = (ends[-1].outcome or "ended") if ends else "running"
    words = {
        "done": "It is done",
        "stopped": "It was stopped early and can go on",
        "failed": "It failed",
        "running": "It is still running, or was cut short",
    }.get(outcome, f"It {outcome}")
    faults = fault_count(record)
    tries = "in one attempt" if attempts == 1 else f"in {_count(attempts)} attempts"
    if not faults:
        return f"{words}, {tries}; nothing out of the ordinary happened."
    events = "one event" if faults == 1 else f"{_count(faults)} events"
    return f"{words}, {tries}; {events} on the way deserve{'s' if faults == 1 else ''} a look."


def fault_count(record: RunRecord) -> int:
    """Count the events of all attempts that are not the ordinary course of a run."""
    return sum(is_fault(line) for line in record.every_line)


def is_fault(line: Line) -> bool:
    """Return True for a line that tells of something unusual: also a gate or a save that failed."""
    if not isinstance(line, EventLine):
        return False
    failed = isinstance(line.content, GateEvent | SaveEvent) and not line.content.ok
    return failed or line.event in FAULTS


def _outcome(record: RunRecord, results: Sequence[EvaluationFile]) -> str:
    told = []
    last = [one for name in record.held_out_sets() for one in record.at_stage_ends(name)[-1:]]
    if last:  # the set with the most text so far out
        one = max(last, key=_far_tokens)
        trained = next((s.longest for s in record.stages if s.name == one.stage), 0)
        near, far = loss_at(one, trained), loss_at(one, 4 * trained)
        if near is not None and far is not None:
            change = "no worse" if far <= near + 0.005 else f"{far - near:.2f} nats worse"
            told.append(
                f"At four times the length it was trained at, it predicts the held-out text "
                f"“{one.held_out}” {change} than within that length ({far:.2f} against "
                f"{near:.2f} nats per token)."
            )
    gain = gain_in_words(newest_gains(record, results))
    if gain is not None:
        told.append(gain)
    rate = needle_rate(results)
    if rate is not None:
        beyond = "" if rate.beyond is None else f"; beyond that length {rate.beyond:.0%}"
        told.append(
            "Asked for a sentence hidden in a text no longer than its training texts, it answers "
            f"{rate.within:.0%} of {rate.trials} questions in full{beyond}."
        )
    return " ".join(told)


def _far_tokens(one: Evaluation) -> int:
    return one.by_position[-1].tokens if one.by_position else 0


def key_figures(record: RunRecord, results: Sequence[EvaluationFile]) -> list[Figure]:
    """Return four to six large numbers."""
    found = []
    for held_out in record.held_out_sets()[:2]:
        known = [one for one in record.scores(held_out, "stream") if one.loss is not None]
        if known:
            one = known[-1]
            bits = one.bits_per_byte
            by_byte = "" if bits is None else f"; {bits:.3f} bits per byte"
            found.append(Figure(f"{one.loss:.3f}", f"held-out loss, {held_out}",
                                f"nats per token in rows of {one.length:,}{by_byte}"))  # fmt: skip
    rate = needle_rate(results)
    if rate is not None:
        note = f"{rate.trials} trials up to {rate.trained:,} tokens"
        found.append(Figure(f"{rate.within:.0%}", "needles found", note))
    speeds = [line.tokens_per_second for line in record.steps if line.tokens_per_second]
    if speeds:
        median = sorted(speeds)[len(speeds) // 2]
        found.append(Figure(f"{median:,.0f}", "tokens per second", "median step, all ranks"))
    found.append(Figure(short_number(record.steps[-1].tokens), "tokens seen",
                        f"{record.steps[-1].step:,} steps"))  # fmt: skip
    faults = fault_count(record)
    attempts = max(line.attempt for line in record.ledger.lines)
    found.append(Figure(str(faults), "unusual events",
                        f"{attempts} attempt{'s' if attempts > 1 else ''}"))  # fmt: skip
    return found


def comparison(records: Sequence[RunRecord], results: Sequence[Sequence[EvaluationFile]]) -> Table:
    """Return a row for each run, with what one would compare first."""
    sets = list(dict.fromkeys(name for record in records for name in record.held_out_sets()))
    head = ("run", "parameters", "layers", "tokens", "longest row",
            *(f"loss, {name}" for name in sets), *(f"bits per byte, {name}" for name in sets),
            "needles found", "found beyond", "tokens/s",
            "attempts")  # fmt: skip
    rows: list[list[Cell]] = []
    for record, mine in zip(records, results, strict=True):
        run, rate = record.config, needle_rate(mine)
        last = [
            next((one for one in reversed(record.scores(name, "stream")) if one.loss is not None),
                 None)
            for name in sets
        ]  # fmt: skip
        losses: list[Any] = [None if one is None else one.loss for one in last]
        losses += [None if one is None else one.bits_per_byte for one in last]
        speeds = sorted(one.tokens_per_second for one in record.steps if one.tokens_per_second)
        rows.append([
            record.name, parameters(run.model) if run else None,
            _layers(run) if run else None, record.steps[-1].tokens,
            max(stage.longest for stage in record.stages), *losses,
            rate.within if rate else None, rate.beyond if rate else None,
            speeds[len(speeds) // 2] if speeds else None,
            max(line.attempt for line in record.ledger.lines),
        ])  # fmt: skip
    return Table(head, rows, "At a glance")


def _layers(run: RunConfig) -> str:
    names = run.model.layer_plan.names()
    return ", ".join(f"{names.count(kind)} {kind}" for kind in dict.fromkeys(names))


def duration(seconds: float) -> str:
    """Write a span of time in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:,.1f} h"
