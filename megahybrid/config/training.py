"""Optimizer, checkpoints, evaluation, logging, the start of a run and the choice of kernels."""

from typing import Annotated, Literal, assert_never

from pydantic import Field, model_validator

from megahybrid.config.base import Frozen, Name


class SpikeConfig(Frozen):
    """The rule by which updates are refused: far above the loss or gradient norm of the last
    steps."""

    action: Literal["skip", "rewind"] = Field(
        default="skip",
        description="skip: this update's data is passed over; rewind: back to the newest "
        "checkpoint, and all data since then is passed over",
    )
    sigmas: float = Field(default=6.0, gt=0, description="standard deviations above the mean")
    over_steps: int = Field(default=128, ge=4, description="steps that mean and deviation are of")


class OptimizerConfig(Frozen):
    """AdamW. The learning rate is not here: it belongs to the stages."""

    kind: Literal["adamw"] = Field(default="adamw", description="the optimizer")
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        Field(strict=False),
    ] = Field(default=(0.9, 0.95), description="decay rates of the two moments")
    eps: float = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(
        default=0.1, ge=0, description="decoupled decay, on the parameters that the table names"
    )
    clip_norm: float | None = Field(
        default=1.0, gt=0, description="largest global gradient norm; null: no clipping"
    )
    skip_spikes: SpikeConfig | None = Field(
        default=None, description="updates to refuse, and what then; null: none"
    )
    parametrisation: Literal["standard", "mup"] = Field(
        default="standard",
        description="how initial values and learning rates depend on width",
    )
    base_hidden_size: int | None = Field(
        default=None, ge=1, description="mup: the width at which the learning rate was tuned"
    )

    @model_validator(mode="after")
    def _check_mup(self) -> "OptimizerConfig":
        if self.parametrisation == "mup" and self.base_hidden_size is None:
            raise ValueError(
                "base_hidden_size is missing (parametrisation=mup). "
                "Give the hidden_size at which the learning rate was tuned."
            )
        if self.parametrisation == "standard" and self.base_hidden_size is not None:
            raise ValueError(
                f"base_hidden_size={self.base_hidden_size} has no meaning with "
                "parametrisation=standard. Remove it, or use parametrisation: mup."
            )
        return self

    def width_ratio(self, hidden_size: int) -> float:
        """How many times wider a model is than the one its learning rate was tuned for; 1 where
        nothing depends on width."""
        match self.parametrisation:
            case "standard":
                return 1.0
            case "mup":
                assert self.base_hidden_size is not None
                return hidden_size / self.base_hidden_size
            case never:
                assert_never(never)


class CheckpointConfig(Frozen):
    """The steps at which checkpoints are written, besides the end of every stage."""

    every_steps: int = Field(default=1000, gt=0, description="steps between two checkpoints")
    asynchronous: bool = Field(
        default=True,
        description="write beside the training, from a copy in host memory (a rank's share of "
        "12 bytes per parameter)",
    )
    keep_last: int = Field(default=3, ge=1, description="newest checkpoints that stay")
    keep_every_steps: int | None = Field(
        default=None, gt=0, description="those of every so many steps stay as well; null: none"
    )
    keep_best: str | None = Field(
        default=None,
        description="a held-out set: the checkpoint with the lowest loss on it stays as well",
    )


class TrainingSuite(Frozen):
    """A suite that is asked while the model trains, besides the end of every stage."""

    path: str = Field(description="the suite's file, as `megahybrid evaluate` takes it")
    every_steps: int | None = Field(
        default=None, gt=0, description="steps between two times; null: stage ends only"
    )


class EvaluateConfig(Frozen):
    """Validation on every held-out set, besides the end of every stage."""

    every_steps: int | None = Field(
        default=1000, gt=0, description="steps between two validations; null: stage ends only"
    )
    max_tokens: int = Field(
        default=1_000_000, gt=0, description="tokens of each held-out set that are used"
    )
    suites: dict[Name, TrainingSuite] = Field(
        default={}, description="needles, puzzles and RULER, by a name for each file"
    )
    attention_every_steps: int | None = Field(
        default=None,
        gt=0,
        description="steps between two samples of what the heads look at; null: none",
    )


class LogConfig(Frozen):
    """The traces and trackers that a run writes to, besides the ledger and the console."""

    audit_every_steps: int | None = Field(
        default=1000, gt=0, description="steps between two gradient audits; null: none"
    )
    profile_steps: Annotated[tuple[int, int], Field(strict=False)] | None = Field(
        default=None, description="[start, stop): the steps that are profiled"
    )
    wandb: Literal["off", "offline", "online"] = Field(
        default="off", description="Weights & Biases"
    )
    wandb_project: str = Field(default="megahybrid", description="project there")
    tensorboard: bool = Field(default=False, description="TensorBoard files in the run's folder")

    @model_validator(mode="after")
    def _check_profile_steps(self) -> "LogConfig":
        if self.profile_steps is not None:
            start, stop = self.profile_steps
            if not 0 <= start < stop:
                raise ValueError(
                    f"profile_steps=[{start}, {stop}] holds no step. "
                    "Use [start, stop] with start < stop."
                )
        return self


class StartConfig(Frozen):
    """A run that branches off another one's checkpoint."""

    checkpoint: str = Field(description="checkpoint folder of the parent run")
    take: Literal["weights", "state", "all"] = Field(
        default="weights",
        description="weights: step and tokens begin at 0; state: the optimizer's moments too; all: "
        "step, tokens and cursors as well",
    )


class KernelConfig(Frozen):
    """Kernels. auto takes the fastest that passes its self-test, by a short measurement at a
    stage's start where a device has several; a checkpoint keeps the choice."""

    full: Literal[
        "auto", "reference", "sdpa", "cudnn", "cudnn_frontend", "varlen", "flex", "fa3", "fa4"
    ] = Field(default="auto", description="kernel of the layers without a window")
    windowed: Literal[
        "auto", "reference", "blocked", "cudnn_frontend", "varlen", "flex", "fa3", "fa4"
    ] = Field(default="auto", description="kernel of the layers with a window")
    blocks: Literal["auto", "plain", "compiled"] = Field(
        default="auto",
        description="what surrounds attention in a layer, and the loss's softmax: as written, or "
        "through torch.compile; auto: measured on CUDA, and on a CPU for long stages",
    )
    products: Literal["auto", "torch", "onednn"] = Field(
        default="auto",
        description="routine of large fp32 products on a CPU: torch's own choice, or oneDNN; auto: "
        "by the processor, measured for long stages",
    )
    norm: Literal["torch", "apex"] = Field(
        default="torch", description="RMSNorm's implementation; apex is NVIDIA's, built by you"
    )

    @model_validator(mode="after")
    def _check_norm(self) -> "KernelConfig":
        if self.norm == "apex" and self.blocks == "compiled":
            raise ValueError(
                "norm=apex cannot be traced by the compiler (kernels.blocks=compiled). "
                "Use kernels.norm=torch, which compiled layers fuse, or kernels.blocks=plain."
            )
        return self
