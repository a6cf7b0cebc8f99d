"""`RunConfig`: everything a run is. What spans its parts is checked in check.py."""

import bisect
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megahybrid.config import limits
from megahybrid.config.anneal import PlanStretch, stretches
from megahybrid.config.base import Frozen
from megahybrid.config.data import DataConfig
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig
from megahybrid.config.parallel import ParallelConfig
from megahybrid.config.ssmax_start import with_starts
from megahybrid.config.stages import Stage, StagePlan
from megahybrid.config.training import (
    CheckpointConfig,
    EvaluateConfig,
    KernelConfig,
    LogConfig,
    OptimizerConfig,
    StartConfig,
)


class RunConfig(Frozen):
    """One run: a model trained through stages, on some data, over some ranks."""

    seed: int = Field(default=1, ge=0, lt=2**63, description="every random draw is keyed by it")
    model: ModelConfig = Field(description="the network")
    parallel: ParallelConfig = Field(default=ParallelConfig(), description="degrees of parallelism")
    data: DataConfig = Field(description="token files and how they are served")
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="AdamW's numbers")
    z_loss: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="z: each target's loss has z (log Z)² more in training, with Z the sum of its "
        "logits' exponentials (1e-5 in Olmo 3); losses that are told are without it. null: none",
    )
    stages: Annotated[list[Stage], limits.STAGES] = Field(
        min_length=1, description="stretches of training, in order"
    )
    checkpoint: CheckpointConfig = Field(
        default=CheckpointConfig(), description="when checkpoints are written"
    )
    evaluate: EvaluateConfig = Field(
        default=EvaluateConfig(), description="when held-out sets are scored"
    )
    start: StartConfig | None = Field(
        default=None, description="the checkpoint this run branches off; null: from nothing"
    )
    log: LogConfig = Field(default=LogConfig(), description="audits, traces and trackers")
    kernels: KernelConfig = Field(default=KernelConfig(), description="attention kernels")
    precision: Literal["fp32", "bf16"] = Field(
        default="bf16", description="of weights and activations; sums and optimizer are fp32"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: cuda where there is one"
    )
    deterministic: bool = Field(
        default=False,
        description="bitwise repeatable on CUDA, slower; the CPU always is, and measures no choice "
        "of kernels with it",
    )
    directory: str | None = Field(
        default=None, description="the run's folder; runs/<name of the run file> when left out"
    )
    max_skipped_in_a_row: int = Field(
        default=10,
        ge=1,
        description="updates skipped for a non-finite gradient before the run stops",
    )

    @model_validator(mode="after")
    def _check_stage_names(self) -> "RunConfig":
        names = [stage.name for stage in self.stages]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ValueError(
                    f"stages.{index}.name={name} is also the name of stages.{names.index(name)}. "
                    "Change one."
                )
        return self

    @model_validator(mode="after")
    def _write_out_starts(self) -> "RunConfig":
        plan = with_starts(self.model.layer_plan, self.stages[0].lengths)
        if plan is self.model.layer_plan:
            return self
        return self.model_copy(update={"model": self.model.model_copy(update={"layer_plan": plan})})

    @cached_property
    def stage_plan(self) -> StagePlan:
        """The steps of the run."""
        return StagePlan(self.stages)

    @cached_property
    def plans(self) -> tuple[tuple[PlanStretch, ...], ...]:
        """The layer plans of each stage, by the tokens of the stage from which they hold; what a
        stage changes holds in those after it. Raises ConfigError, one line per mistake."""
        plan, found = self.model.layer_plan, []
        for index, stage in enumerate(self.stages):
            plan = plan.with_overrides(stage.schemes, where=f"stages.{index}.schemes")
            found.append(stretches(stage.anneal, plan, stage.tokens, f"stages.{index}.anneal"))
            plan = found[-1][-1].plan
        return tuple(found)

    def plan_at(self, stage_index: int) -> LayerPlan:
        """The layer plan that stage `stage_index` ends with; it has no other unless it anneals."""
        return self.plans[stage_index][-1].plan

    def plan_in_force(self, tokens: int) -> LayerPlan:
        """The layer plan of the step that comes when `tokens` have been seen (or that token
        `tokens` lies in). A function of tokens alone, and the same object while nothing changes."""
        point = self.stage_plan.at(tokens)
        plans = self.plans[point.index]
        here = bisect.bisect_right(plans, point.tokens_in_stage, key=lambda part: part.tokens)
        return plans[here - 1].plan

    def plan_after(self, tokens: int) -> LayerPlan:
        """The layer plan of the step that ended with `tokens` seen: what a checkpoint of then was
        trained with. The model's own before any step."""
        return self.plan_in_force(tokens - 1) if tokens else self.model.layer_plan

    def longest_rows(self, tokens: int) -> int:
        """The longest sequences of the stages that have begun when `tokens` have been seen."""
        index = self.stage_plan.at(max(0, tokens - 1)).index
        return max(length for stage in self.stages[: index + 1] for length in stage.lengths)

    def run_directory(self, run_file: str | Path) -> Path:
        """Return the run's folder: `directory`, or runs/<name of the run file>."""
        return Path(self.directory or f"runs/{Path(run_file).stem}")
