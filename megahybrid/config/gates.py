"""`Gate`: what a model must reach at a stage's end before the run goes on."""

from typing import Annotated, Literal

from pydantic import Field

from megahybrid.config.base import Frozen, Name


class LossGate(Frozen):
    """Held-out loss must be low enough."""

    kind: Literal["loss"]
    set: Name = Field(description="a held-out set")
    at_most: float = Field(
        gt=0, description="nats per token, in rows of the stage's longest length"
    )


class SuiteGate(Frozen):
    """A task of a suite of `evaluate.suites` must be answered well enough."""

    kind: Literal["suite"]
    suite: Name = Field(description="its name in evaluate.suites")
    task: Name = Field(description="a task of that suite")
    length: int | None = Field(default=None, ge=1, description="null: the mean of its lengths")
    figure: Literal["exact", "token_accuracy", "score"] = Field(
        default="exact",
        description="exact: whole answers; token_accuracy: answer tokens; score: RULER's, "
        "and of a chat task the answers that end",
    )
    at_least: float = Field(ge=0, le=1, description="share")


Gate = Annotated[LossGate | SuiteGate, Field(discriminator="kind")]
