"""The scales of scores: one number for all queries, or a temperature that depends on the query."""

from typing import Annotated, Literal, assert_never

from pydantic import Field

from megahybrid.config.base import Frozen


class SqrtDimScale(Frozen):
    """Scores times 1 / sqrt(head_dim)."""

    kind: Literal["sqrt_dim"] = "sqrt_dim"


class FixedScale(Frozen):
    """Scores times `scale`, whatever head_dim is."""

    kind: Literal["fixed"]
    scale: float = Field(gt=0, description="multiplies the scores")


class Llama4Scale(Frozen):
    """1 / sqrt(head_dim) times 1 + coefficient * ln(1 + floor((p + offset) / floor)), p the query's
    position within its document (from 0). Llama 4 has offset 1, Ministral 3 has 0."""

    kind: Literal["llama4"]
    floor: int = Field(default=8192, gt=0, description="positions of one step of the factor")
    coefficient: float = Field(default=0.1, ge=0, description="of the logarithm")
    offset: Literal[0, 1] = Field(default=1, description="1: the floor-th token ends a first step")


class PowerScale(Frozen):
    """1 / sqrt(head_dim) times (1 + (p + 1) / length) ** exponent, p the query's position within
    its document (from 0)."""

    kind: Literal["power"]
    length: int = Field(gt=0, description="position at which the base is 2")
    exponent: float = Field(gt=0, description="of the base")


class LogScale(Frozen):
    """1 / sqrt(head_dim) times log_base(base + n), n the visible keys (arXiv 2504.08719)."""

    kind: Literal["log"]
    base: float = Field(gt=1, description="a in log_a(a + n)")


class LogFromScale(Frozen):
    """1 / sqrt(head_dim) times 1 + coefficient * ln(max(n / length, 1)), n the visible keys."""

    kind: Literal["log_from"]
    length: int = Field(gt=0, description="visible keys up to which nothing changes")
    coefficient: float = Field(ge=0, description="of the logarithm")


class SsmaxScale(Frozen):
    """1 / sqrt(head_dim) times s * ln n, s learned per query head, n the number of visible keys
    (arXiv 2501.19399). Every s starts at `initial`."""

    kind: Literal["ssmax"]
    initial: float | None = Field(
        default=None,
        gt=0,
        description="value every s starts at; null: 1 / the mean of ln n over the first stage's "
        "lengths, which makes the mean factor 1 (0.168 at 1,024 tokens)",
    )


ScoreScale = Annotated[
    SqrtDimScale | FixedScale | Llama4Scale | PowerScale | LogScale | LogFromScale | SsmaxScale,
    Field(discriminator="kind"),
]


def learned_scale(scale: ScoreScale) -> str | None:
    """The kind of a scale that has learned parameters, None for one that has none."""
    match scale:
        case SqrtDimScale() | FixedScale():
            return None
        case Llama4Scale() | PowerScale() | LogScale() | LogFromScale():
            return None
        case SsmaxScale():
            return scale.kind
        case never:
            assert_never(never)
