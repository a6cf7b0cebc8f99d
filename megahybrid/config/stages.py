"""`Stage`: a stretch of training under one recipe. `StagePlan`: what every step of a run is, as a
pure function of the tokens seen."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, assert_never

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from megahybrid.config import limits
from megahybrid.config.anneal import Anneal
from megahybrid.config.base import Frozen, Name
from megahybrid.config.gates import Gate
from megahybrid.config.learning_rate import LearningRate
from megahybrid.config.old_words import current_scheme

Recompute = Literal["none", "selective", "chunked", "full", "offload"]
Positive = Annotated[int, Field(gt=0)]
Tokens = Annotated[Positive, limits.TOKENS]
BatchTokens = Annotated[Positive, limits.BATCH_TOKENS]
Length = Annotated[Positive, limits.LENGTH]
Ratio = Annotated[Positive, limits.RATIO]


class BatchRamp(Frozen):
    """A batch that grows: `start` tokens, then `increment` more in equal stretches of tokens, until
    `end` is reached after `over_tokens` of the stage."""

    start: BatchTokens = Field(description="tokens of the first steps")
    end: BatchTokens = Field(description="tokens of every step after the ramp")
    increment: BatchTokens = Field(description="tokens added at a time")
    over_tokens: Tokens = Field(description="tokens of the stage that the ramp takes")
    learning_rate: Literal["kept", "sqrt"] = Field(
        default="kept",
        description="kept: as the stage says; sqrt: times sqrt(batch / end), so that it grows with "
        "the batch (arXiv 1404.5997)",
    )

    @model_validator(mode="after")
    def _check_ramp(self) -> "BatchRamp":
        if self.end <= self.start:
            raise ValueError(f"end={self.end} is not above start={self.start}. Raise end.")
        if (self.end - self.start) % self.increment:
            raise ValueError(
                f"increment={self.increment} does not divide end - start={self.end - self.start}. "
                "Change one of them."
            )
        if (self.end - self.start) // self.increment > limits.RAMP_LEVELS:
            raise ValueError(
                f"increment={self.increment} makes {(self.end - self.start) // self.increment:,} "
                f"levels, more than {limits.RAMP_LEVELS:,} (each is kept and searched). Raise it."
            )
        return self

    def rate_factor(self, batch_tokens: int) -> float:
        """What multiplies the stage's learning rate in a step of so many tokens."""
        match self.learning_rate:
            case "kept":
                return 1.0
            case "sqrt":
                return math.sqrt(batch_tokens / self.end)
            case _:
                assert_never(self.learning_rate)

    def levels(self) -> list[tuple[int, int]]:
        """(tokens of the stage from which it holds, batch tokens) of every level, in order."""
        count = (self.end - self.start) // self.increment
        return [
            (-(-self.over_tokens * level // count), self.start + level * self.increment)
            for level in range(count + 1)
        ]


def _batch_form(value: Any) -> str:
    return "ramp" if isinstance(value, dict | BatchRamp) else "constant"


class RecomputeBudget(Frozen):
    """A policy per layer that fits: as little is computed again as the memory formulas allow."""

    budget_gib: Annotated[float, Field(gt=0)] = Field(
        description="GiB that a step may take on one rank, weights and optimizer included"
    )


def _recompute_form(value: Any) -> str:
    if isinstance(value, dict | RecomputeBudget):
        return "budget"
    return "per_layer" if isinstance(value, list | tuple) else "all"


class Stage(Frozen):
    """A stretch of training under one recipe."""

    name: Name = Field(description="name in the ledger and the plots")
    tokens: Tokens = Field(description="the stage ends with the first step that reaches these")
    lengths: Annotated[dict[Length, Ratio], limits.LENGTHS] = Field(
        min_length=1,
        description="sequence lengths with their ratio by sequences; a step has one length",
    )
    batch_tokens: Annotated[
        Annotated[BatchTokens, Tag("constant")] | Annotated[BatchRamp, Tag("ramp")],
        Discriminator(_batch_form),
    ] = Field(description="tokens of one step over all ranks; a multiple of every length")
    micro_batch_tokens: Annotated[Positive, limits.MICRO_BATCH_TOKENS] = Field(
        description="tokens of one forward and backward on a data rank; a multiple of every length"
    )
    weights: Annotated[dict[Name, Annotated[float, Field(ge=0)]], limits.SOURCES] = Field(
        description="shares of the sources, by tokens; they need not sum to 1"
    )
    schemes: dict[Name, dict[str, Any]] = Field(
        default={}, description="fields of attention schemes that change from this stage on"
    )
    anneal: Anneal | None = Field(
        default=None, description="fields of attention schemes that change while the stage runs"
    )
    recompute: Annotated[
        Annotated[Recompute, Tag("all")]
        | Annotated[list[Recompute], Tag("per_layer")]
        | Annotated[RecomputeBudget, Tag("budget")],
        Discriminator(_recompute_form),
    ] = Field(
        default="none",
        description="activations computed again in backward, one word for all or per layer, or a "
        "budget that decides; chunked: selective, with the MLP in chunks of the sequence; offload: "
        "full, with layers' inputs in host memory",
    )
    learning_rate: LearningRate = Field(description="the stage's segment of the learning rate")
    gates: list[Gate] = Field(
        default=[], description="what must be reached at the stage's end, or the run stops there"
    )

    @field_validator("schemes")
    @classmethod
    def _read_old_word(cls, schemes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {name: current_scheme(fields) for name, fields in schemes.items()}

    @model_validator(mode="after")
    def _check_learning_rate(self) -> "Stage":
        if self.learning_rate.shortest_stage() > self.tokens:
            raise ValueError(
                f"tokens={self.tokens} has no room for the learning rate's warm-up and decay "
                f"({self.learning_rate.shortest_stage()} tokens). Shorten them."
            )
        return self

    @model_validator(mode="after")
    def _check_weights(self) -> "Stage":
        if not any(weight > 0 for weight in self.weights.values()):
            raise ValueError("weights has no positive share. Give at least one source a weight.")
        return self

    def batch_levels(self) -> list[tuple[int, int]]:
        """(tokens of the stage from which it holds, batch tokens), in order."""
        if isinstance(self.batch_tokens, BatchRamp):
            return self.batch_tokens.levels()
        return [(0, self.batch_tokens)]

    def rate(self, tokens: int, batch_tokens: int) -> float:
        """The learning rate of the step of `batch_tokens` that ends with `tokens` of the stage."""
        rate = self.learning_rate.rate(tokens, self.tokens)
        ramp = self.batch_tokens
        return rate * ramp.rate_factor(batch_tokens) if isinstance(ramp, BatchRamp) else rate

    def recompute_of_layer(self, layer: int) -> Recompute:
        """The recompute policy of one layer, where the stage names it: a budget is solved by
        `memory.policies_of`."""
        assert not isinstance(self.recompute, RecomputeBudget)
        return self.recompute if isinstance(self.recompute, str) else self.recompute[layer]


@dataclass(frozen=True)
class StagePoint:
    """One step of a run, as `StagePlan.at` finds it from the tokens seen before it."""

    index: int  # of the stage
    stage: Stage
    step: int  # of the run, from 0
    step_in_stage: int
    tokens_in_stage: int  # seen before this step
    length: int
    batch_tokens: int
    learning_rate: float

    @property
    def rows(self) -> int:
        """Sequences of this step over all ranks."""
        return self.batch_tokens // self.length

    @property
    def micro_batch_rows(self) -> int:
        """Sequences of one forward and backward on one data rank."""
        return self.stage.micro_batch_tokens // self.length

    def micro_batches(self, data_degree: int) -> int:
        """Forward and backward passes of this step on each of `data_degree` data ranks."""
        return self.batch_tokens // (data_degree * self.stage.micro_batch_tokens)


@dataclass(frozen=True)
class _Run:
    """Consecutive steps of a stage with equal batch tokens."""

    tokens: int  # of the stage before them
    step: int  # of the stage
    batch_tokens: int
    count: int


class StagePlan:
    """The steps of a run, as a function of the tokens seen before each.

    A stage ends with the first step that reaches its tokens; the surplus counts to it, once, and
    the next stage has its tokens whole.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = tuple(stages)
        self._runs = [_runs(stage) for stage in self.stages]
        self._lengths = [LengthOrder(stage.lengths) for stage in self.stages]

    @cached_property
    def stage_steps(self) -> tuple[int, ...]:
        """Steps of each stage."""
        return tuple(runs[-1].step + runs[-1].count for runs in self._runs)

    @cached_property
    def stage_tokens(self) -> tuple[int, ...]:
        """Tokens of each stage as they are counted, the last step's surplus included."""
        return tuple(r[-1].tokens + r[-1].batch_tokens * r[-1].count for r in self._runs)

    @cached_property
    def stage_ends(self) -> tuple[int, ...]:
        """Tokens seen when each stage ends."""
        return tuple(sum(self.stage_tokens[: i + 1]) for i in range(len(self.stages)))

    @property
    def total_tokens(self) -> int:
        """Tokens seen when the run ends."""
        return self.stage_ends[-1]

    @property
    def total_steps(self) -> int:
        """Steps of the run."""
        return sum(self.stage_steps)

    def finished(self, tokens: int) -> bool:
        """Return whether no step is left after `tokens`."""
        return tokens >= self.total_tokens

    def first_step(self, index: int, tokens_in_stage: int) -> int:
        """The first step of stage `index`, counted from its own 0, that begins with at least
        `tokens_in_stage` seen; the stage's steps when none does."""
        for run in self._runs[index]:
            steps = max(0, -(-(tokens_in_stage - run.tokens) // run.batch_tokens))
            if steps < run.count:
                return run.step + steps
        return self.stage_steps[index]

    def at(self, tokens: int) -> StagePoint:
        """The step that comes when `tokens` have been seen (or that token `tokens` lies in).

        Raises ValueError when the run has no such step.
        """
        if tokens < 0 or self.finished(tokens):
            raise ValueError(
                f"tokens={tokens} is outside the run (total_tokens={self.total_tokens})"
            )
        index = bisect.bisect_right(self.stage_ends, tokens)
        stage, runs = self.stages[index], self._runs[index]
        within = tokens - (self.stage_ends[index - 1] if index else 0)
        run = runs[bisect.bisect_right(runs, within, key=lambda run: run.tokens) - 1]
        step_of_run = (within - run.tokens) // run.batch_tokens
        step = run.step + step_of_run
        start = run.tokens + step_of_run * run.batch_tokens
        return StagePoint(
            index=index,
            stage=stage,
            step=sum(self.stage_steps[:index]) + step,
            step_in_stage=step,
            tokens_in_stage=start,
            length=self._lengths[index].at(step),
            batch_tokens=run.batch_tokens,
            learning_rate=stage.rate(start + run.batch_tokens, run.batch_tokens),
        )


def _runs(stage: Stage) -> list[_Run]:
    runs: list[_Run] = []
    tokens = step = 0
    levels = stage.batch_levels()
    for index, (_, batch_tokens) in enumerate(levels):
        until = levels[index + 1][0] if index + 1 < len(levels) else stage.tokens
        count = max(0, -(-(min(until, stage.tokens) - tokens) // batch_tokens))
        if count:
            runs.append(_Run(tokens, step, batch_tokens, count))
            tokens += count * batch_tokens
            step += count
    return runs


class LengthOrder:
    """The length of each step of a stage: a deterministic sequence of low discrepancy.

    A step of length L holds batch_tokens / L sequences, so a ratio r by sequences is a ratio r * L
    by steps. After every n steps each length has had its exact share to within one step
    (Tijdeman 1980: among the lengths far enough behind, the one whose deadline comes first).
    """

    def __init__(self, ratio: dict[int, int]) -> None:
        self._lengths = sorted(ratio)
        weights = [ratio[length] * length for length in self._lengths]
        common = math.gcd(*weights)
        self._weights = [weight // common for weight in weights]
        self.period = sum(self._weights)
        self._order: list[int] = []  # filled as far as asked, at most one period
        self._behind = [0] * len(weights)  # share due minus steps had, in units of 1 / period

    def at(self, step: int) -> int:
        """The length of the stage's step `step` (from 0)."""
        if len(self._lengths) == 1:
            return self._lengths[0]
        position = step % self.period
        while len(self._order) <= position:
            self._order.append(self._next())
        return self._lengths[self._order[position]]

    def _next(self) -> int:
        slack = 2 * len(self._lengths) - 2
        best, best_key = -1, (0, 1)
        for index, weight in enumerate(self._weights):
            self._behind[index] += weight
            late = self._behind[index] * slack
            if late < self.period:
                continue
            # Deadline (period * (slack - 1) - late) / (slack * weight), compared without division.
            key = (self.period * (slack - 1) - late, weight)
            if best < 0 or key[0] * best_key[1] < best_key[0] * key[1]:
                best, best_key = index, key
        self._behind[best] -= self.period
        return best
