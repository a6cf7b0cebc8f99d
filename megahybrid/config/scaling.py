"""How the frequencies of a rotation change when the context grows: one record per method.

The formulas are written once, over an array module `xp`: numpy for exact arithmetic without torch,
torch for the fp32 bits that run.
"""

import math
from types import ModuleType
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import Field, model_validator

from megahybrid.config.base import Frozen, Numbers

Array = Any  # numpy.ndarray or torch.Tensor, as the caller's `xp` makes them


def plain_frequencies(
    theta: float, rotary_dim: int, xp: ModuleType, dtype: Any, pairs: int | None = None
) -> Array:
    """1 / theta ** (2i / D) for i = 0 … D/2 - 1, in transformers' order of operations; for the
    first `pairs` alone where they are given: a power in a vector's last, unfilled lanes can have
    another last bit than the same power elsewhere, so theirs are made alone as well."""
    stop = rotary_dim if pairs is None else 2 * pairs
    return 1.0 / (theta ** (xp.arange(0, stop, 2, dtype=dtype) / rotary_dim))


@runtime_checkable
class FrequencyScaling(Protocol):
    """The methods that every scaling has. Lists in one are tuples (`Numbers`): cos and sin are made
    once for equal rotations, which are found by their hash."""

    @property
    def kind(self) -> str:
        """Its name in a run file."""

    def frequencies(self, theta: float, rotary_dim: int, xp: ModuleType, dtype: Any) -> Array:
        """Angular frequencies [rotary_dim / 2], in transformers' order of operations."""

    def attention_factor_value(self) -> float:
        """Multiplier of cos and sin."""

    def words(self) -> str:
        """Return its name for tables: "yarn x8"."""

    def problem(self, rotary_dim: int, head_dim: int) -> str | None:
        """Return why it cannot scale so many rotated dimensions of a head and what to do, as it
        follows its dotted name; None where it can."""

    def __hash__(self) -> int:
        """Equal ones have the same."""


class _ByFactor(Frozen):
    """A scaling that one number describes well enough for a table."""

    kind: str
    factor: float

    def words(self) -> str:
        """Its kind and factor."""
        return f"{self.kind} x{self.factor:g}"

    def problem(self, rotary_dim: int, head_dim: int) -> str | None:
        """None: it scales any rotation."""
        return None


class LinearScaling(_ByFactor):
    """Position interpolation: every frequency divided by `factor` (arXiv 2306.15595)."""

    kind: Literal["linear"]
    factor: float = Field(ge=1, description="every frequency is divided by it")

    def frequencies(self, theta: float, rotary_dim: int, xp: ModuleType, dtype: Any) -> Array:
        """Angular frequencies [rotary_dim / 2]."""
        return plain_frequencies(theta, rotary_dim, xp, dtype) / self.factor

    def attention_factor_value(self) -> float:
        """Multiplier of cos and sin."""
        return 1.0


class NtkScaling(_ByFactor):
    """Static NTK-aware scaling: theta becomes theta * factor ** (D / (D - 2))."""

    kind: Literal["ntk"]
    factor: float = Field(ge=1, description="the context grows by it")

    def scaled_theta(self, theta: float, rotary_dim: int) -> float:
        """The theta whose plain frequencies these are."""
        return theta * self.factor ** (rotary_dim / (rotary_dim - 2))

    def problem(self, rotary_dim: int, head_dim: int) -> str | None:
        """Its exponent divides by the rotated dimensions less two."""
        if rotary_dim > 2:
            return None
        return (
            f"kind=ntk needs more than one rotated pair (rotary dimensions={rotary_dim}, "
            f"model.head_dim={head_dim}). Use kind: linear."
        )

    def frequencies(self, theta: float, rotary_dim: int, xp: ModuleType, dtype: Any) -> Array:
        """Angular frequencies [rotary_dim / 2]."""
        return plain_frequencies(self.scaled_theta(theta, rotary_dim), rotary_dim, xp, dtype)

    def attention_factor_value(self) -> float:
        """Multiplier of cos and sin."""
        return 1.0


class YarnScaling(_ByFactor):
    """YaRN (arXiv 2309.00071) as shipped: a ramp, linear in the pair index, between interpolation
    and extrapolation, with cos and sin multiplied by 0.1 ln(factor) + 1."""

    kind: Literal["yarn"]
    factor: float = Field(ge=1, description="the context grows by it")
    original_length: int = Field(gt=0, description="tokens the model was trained on before")
    beta_fast: float = Field(
        default=32.0, gt=0, description="turns over original_length above which a pair is kept"
    )
    beta_slow: float = Field(
        default=1.0, gt=0, description="turns below which a pair is interpolated"
    )
    attention_factor: float | None = Field(
        default=None, gt=0, description="multiplies cos and sin; 0.1 ln(factor) + 1 when left out"
    )
    truncate: bool = Field(default=True, description="round the ramp's bounds to whole pairs")

    @model_validator(mode="after")
    def _check_betas(self) -> "YarnScaling":
        if self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"beta_fast={self.beta_fast:g} is not above beta_slow={self.beta_slow:g}. "
                "Raise beta_fast."
            )
        return self

    def ramp_bounds(self, theta: float, rotary_dim: int) -> tuple[float, float]:
        """First and last pair index of the ramp: d(n) = D ln(L / (2 pi n)) / (2 ln theta)."""

        def pair_index(rotations: float) -> float:
            return (
                rotary_dim
                * math.log(self.original_length / (rotations * 2 * math.pi))
                / (2 * math.log(theta))
            )

        low, high = pair_index(self.beta_fast), pair_index(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(float(low), 0.0), min(float(high), rotary_dim - 1.0)
        return low, high + 0.001 if low == high else high

    def frequencies(self, theta: float, rotary_dim: int, xp: ModuleType, dtype: Any) -> Array:
        """Angular frequencies [rotary_dim / 2], in transformers' order of operations."""
        powers = theta ** (xp.arange(0, rotary_dim, 2, dtype=dtype) / rotary_dim)
        extrapolation = 1.0 / powers
        interpolation = 1.0 / (self.factor * powers)
        low, high = self.ramp_bounds(theta, rotary_dim)
        ramp = (xp.arange(rotary_dim // 2, dtype=dtype) - low) / (high - low)
        keep = 1 - xp.clip(ramp, 0, 1)
        return interpolation * (1 - keep) + extrapolation * keep

    def attention_factor_value(self) -> float:
        """Multiplier of cos and sin (scores change by its square)."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 1.0 if self.factor <= 1 else 0.1 * math.log(self.factor) + 1.0


class Llama3Scaling(_ByFactor):
    """Llama 3.1's scaling: long wavelengths interpolated, short ones kept, a blend between; with
    equal factors, as Llama 4 Scout has them, a step."""

    kind: Literal["llama3"]
    factor: float = Field(ge=1, description="long wavelengths are stretched by it")
    low_frequency_factor: float = Field(
        default=1.0, gt=0, description="wavelengths above original_length / this are stretched"
    )
    high_frequency_factor: float = Field(
        default=4.0, gt=0, description="wavelengths below original_length / this are kept"
    )
    original_length: int = Field(gt=0, description="tokens the model was trained on before")

    @model_validator(mode="after")
    def _check_factors(self) -> "Llama3Scaling":
        if self.high_frequency_factor < self.low_frequency_factor:
            raise ValueError(
                f"high_frequency_factor={self.high_frequency_factor} is below "
                f"low_frequency_factor={self.low_frequency_factor}. Raise high_frequency_factor."
            )
        return self

    def frequencies(self, theta: float, rotary_dim: int, xp: ModuleType, dtype: Any) -> Array:
        """Angular frequencies [rotary_dim / 2], in transformers' order of operations."""
        low_wavelength = self.original_length / self.low_frequency_factor
        high_wavelength = self.original_length / self.high_frequency_factor
        inverse = plain_frequencies(theta, rotary_dim, xp, dtype)
        wavelength = 2 * math.pi / inverse
        scaled = xp.where(wavelength > low_wavelength, inverse / self.factor, inverse)
        if self.high_frequency_factor == self.low_frequency_factor:
            return scaled  # the blend would divide by zero, and nothing lies between
        smooth = (self.original_length / wavelength - self.low_frequency_factor) / (
            self.high_frequency_factor - self.low_frequency_factor
        )
        blended = (1 - smooth) * scaled / self.factor + smooth * scaled
        is_medium = ~(wavelength < high_wavelength) & ~(wavelength > low_wavelength)
        return xp.where(is_medium, blended, scaled)

    def attention_factor_value(self) -> float:
        """Multiplier of cos and sin."""
        return 1.0


class LongRopeScaling(_ByFactor):
    """LongRoPE (arXiv 2402.13753): each frequency divided by a number of its own, found by search;
    one list for texts of every length. cos and sin are multiplied by sqrt(1 + ln s / ln L0)."""

    kind: Literal["longrope"]
    factors: Numbers = Field(
        min_length=1, description="what each frequency is divided by, the fastest first"
    )
    factor: float = Field(ge=1, description="s: the context grows by it")
    original_length: int = Field(ge=2, description="L0: tokens the model was trained on before")
    attention_factor: float | None = Field(
        default=None,
        gt=0,
        description="multiplies cos and sin; sqrt(1 + ln factor / ln original_length) when left "
        "out",
    )

    @model_validator(mode="after")
    def _check_factors(self) -> "LongRopeScaling":
        for index, factor in enumerate(self.factors):
            if factor <= 0:
                raise ValueError(f"factors.{index}={factor:g} is not above 0. Raise it.")
        return self

    def frequencies(self, theta: float, rotary_dim: int, xp: ModuleType, dtype: Any) -> Array:
        """Angular frequencies [rotary_dim / 2], in transformers' order of operations."""
        powers = theta ** (xp.arange(0, rotary_dim, 2, dtype=dtype) / rotary_dim)
        return 1.0 / (xp.asarray(self.factors, dtype=dtype) * powers)

    def problem(self, rotary_dim: int, head_dim: int) -> str | None:
        """There is a number for each frequency."""
        found, wanted = len(self.factors), rotary_dim // 2
        if found == wanted:
            return None
        return (
            f"factors has {found} entries, not the {wanted} of half the {rotary_dim} dimensions "
            f"that its frequencies are of (model.head_dim={head_dim}). Give {wanted}."
        )

    def attention_factor_value(self) -> float:
        """Multiplier of cos and sin (scores change by its square)."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))


Scaling = Annotated[
    LinearScaling | NtkScaling | YarnScaling | Llama3Scaling | LongRopeScaling,
    Field(discriminator="kind"),
]
