"""A run's folder as the report sees it: the ledger cut into stages, and the evaluations."""

import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from megahybrid.config import RunConfig, load
from megahybrid.config.old_words import silent
from megahybrid.config.shape import shown
from megahybrid.errors import MegahybridError, from_os_error
from megahybrid.ledger import (
    LEDGER_NAME,
    EvaluateEvent,
    EventLine,
    Ledger,
    Line,
    PositionBucket,
    StepLine,
    TurnLoss,
    damage,
    read_every_line,
    read_ledger,
)

CONFIG_NAME = "config.yaml"
SAMPLES_NAME = "samples.txt"
MOST_OF_SAMPLES = 1_000_000  # characters; a page shows fewer


@dataclass(frozen=True)
class StageRecord:
    """The steps that a stage took so far, from `begin` to `end` tokens of the run."""

    name: str
    begin: int
    end: int
    steps: tuple[StepLine, ...]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The sequence lengths its steps had, shortest first."""
        return tuple(sorted({line.length for line in self.steps}))

    @property
    def longest(self) -> int:
        """The longest sequence length of its steps."""
        return self.lengths[-1]


@dataclass(frozen=True)
class Evaluation:
    """The loss on one held-out set at one moment; see the evaluate event of the ledger."""

    held_out: str
    rows: str  # stream: the whole file cut at `length`; documents: each row within one document
    stage: str
    step: int
    run_tokens: int
    length: int
    loss: float | None
    tokens: int
    by_position: tuple[PositionBucket, ...]
    by_turn: tuple[TurnLoss, ...] = ()  # of conversations


@dataclass(frozen=True)
class RunRecord:
    """Everything that the report shows of a run, but for its `evaluations`."""

    directory: Path
    ledger: Ledger
    config: RunConfig | None
    samples: str | None
    stages: tuple[StageRecord, ...]
    evaluations: tuple[Evaluation, ...]
    label: str | None = None  # what it is called where two runs would share a name

    @property
    def name(self) -> str:
        """The directory's name, or its label."""
        return self.label or self.directory.resolve().name

    @property
    def slug(self) -> str:
        """The name as an identifier of HTML."""
        return re.sub(r"[^A-Za-z0-9_-]+", "-", self.name)

    @cached_property
    def every_line(self) -> list[Line]:
        """The lines of every attempt, also those that a resume made void."""
        return _checked(self.directory, read_every_line)

    @cached_property
    def steps(self) -> list[StepLine]:
        """All step lines, in order."""
        return self.ledger.steps

    def column(self, name: str) -> np.ndarray:
        """A number of every step line as float64 [steps]; what is missing is nan."""
        values = [getattr(line, name) for line in self.steps]
        return np.array([np.nan if value is None else value for value in values], dtype=float)

    def held_out_sets(self) -> list[str]:
        """Names of the held-out sets, in the order they were first scored."""
        return list(dict.fromkeys(one.held_out for one in self.evaluations))

    def scores(self, held_out: str, rows: str) -> list[Evaluation]:
        """The evaluations of one set on one kind of rows, in order."""
        return [one for one in self.evaluations if (one.held_out, one.rows) == (held_out, rows)]

    def at_stage_ends(self, held_out: str) -> list[Evaluation]:
        """The last evaluation by position in each stage, on documents where there are any."""
        for rows in ("documents", "stream"):
            scored = [one for one in self.scores(held_out, rows) if one.by_position]
            if scored:
                return list({one.stage: one for one in scored}.values())
        return []


def read_record(directory: Path, label: str | None = None) -> RunRecord:
    """Read `ledger.jsonl`, and `config.yaml` and `samples.txt` where they are."""
    ledger = Ledger(tuple(_checked(directory, lambda path: read_ledger(path).lines)))
    if not ledger.steps:
        raise MegahybridError(
            f"{directory / LEDGER_NAME} holds no step yet. Train the run first: megahybrid train."
        )
    config = directory / CONFIG_NAME
    return RunRecord(
        directory=directory,
        ledger=ledger,
        config=load(config, tell=silent) if config.exists() else None,
        samples=_samples(directory / SAMPLES_NAME),
        stages=_stages(ledger.steps),
        evaluations=tuple(_evaluation(line, score) for line, score in ledger.of(EvaluateEvent)),
        label=label,
    )


def _checked(directory: Path, read: Callable[[Path], Iterable[Line]]) -> list[Line]:
    """Read the lines of a ledger. Raises MegahybridError where a page cannot be drawn of one."""
    path = directory / LEDGER_NAME
    try:
        lines = list(read(path))
    except (RecursionError, OverflowError):
        raise MegahybridError(f"{path} is damaged (endless lists). Restore the file.") from None
    for line in lines:
        wrong = damage(line)
        if wrong is not None:
            kind = line.event if isinstance(line, EventLine) else "step line"
            raise MegahybridError(
                f"{path} is damaged at step {shown(line.step)} ({shown(kind)}: {wrong}). "
                "Restore the file, or remove this line."
            )
    return lines


def _samples(path: Path) -> str | None:
    try:
        with path.open(encoding="utf-8", errors="backslashreplace") as file:
            return file.read(MOST_OF_SAMPLES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise from_os_error(error) or error from None


def _stages(steps: list[StepLine]) -> tuple[StageRecord, ...]:
    stages: list[StageRecord] = []
    for name, lines in itertools.groupby(steps, key=lambda line: line.stage):
        mine = tuple(lines)
        begin = stages[-1].end if stages else _tokens_before(steps)
        stages.append(StageRecord(name, begin, mine[-1].tokens, mine))
    return tuple(stages)


def _tokens_before(steps: list[StepLine]) -> int:
    # A run that branches off with its parent's tokens does not begin at 0.
    batch = steps[1].tokens - steps[0].tokens if len(steps) > 1 else steps[0].tokens
    return max(0, steps[0].tokens - batch)


def _evaluation(line: EventLine, score: EvaluateEvent) -> Evaluation:
    return Evaluation(
        held_out=score.set,
        rows=score.rows or "stream",
        stage=line.stage if score.stage is None else score.stage,
        step=line.step,
        run_tokens=line.tokens,
        length=score.length,
        loss=score.loss,
        tokens=score.tokens,
        by_position=tuple(
            # Nothing was counted: no mean of it is known.
            bucket if bucket.tokens else replace(bucket, loss=None)
            for bucket in score.by_position
        ),
        by_turn=score.by_turn or (),
    )
