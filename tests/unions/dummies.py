"""Members that are in a union and nowhere else, and what each place says of them.

`python -m tests.unions.dummies` runs as a user's process does, without annotations being checked,
and prints {member: {place: error or null}}: null where a place passes a member silently.
"""

import json
import sys
import warnings
from types import ModuleType
from typing import Any, Literal

from megahybrid.checkpoint.fingerprint import model_fingerprint
from megahybrid.config.attention import QKNorm
from megahybrid.config.base import Frozen, Numbers
from megahybrid.config.model import ModelConfig
from megahybrid.config.scaling import Array
from tests.unions.members import EXAMPLES
from tests.unions.probes import PLACES, PassedSilently, without_oracle


class Alibi(Frozen):
    """A position that no code knows."""

    kind: Literal["alibi"] = "alibi"
    slope: float = 0.5


class Stretched(Frozen):
    """A scaling that no code knows."""

    kind: Literal["stretched"] = "stretched"
    factors: Numbers = (2.0, 3.0)


class Squared(Frozen):
    """A score scale that no code knows."""

    kind: Literal["squared"] = "squared"


class PerDimension(Frozen):
    """A factor of its own for each frequency: all that a scaling must tell, in one class."""

    kind: Literal["per_dimension"] = "per_dimension"
    factors: Numbers

    def frequencies(self, theta: float, rotary_dim: int, xp: ModuleType, dtype: Any) -> Array:
        """Plain frequencies over their factors."""
        powers = theta ** (xp.arange(0, rotary_dim, 2, dtype=dtype) / rotary_dim)
        return 1.0 / (xp.asarray(self.factors, dtype=dtype) * powers)

    def attention_factor_value(self) -> float:
        """Multiplier of cos and sin."""
        return 1.25

    def words(self) -> str:
        """Its kind and the largest factor."""
        return f"{self.kind} x{max(self.factors):g}"

    def problem(self, rotary_dim: int, head_dim: int) -> str | None:
        """A factor for each frequency."""
        if len(self.factors) == rotary_dim // 2:
            return None
        return f"factors has {len(self.factors)} entries, not {rotary_dim // 2}. Give as many."


def with_scheme(**update: Any) -> ModelConfig:
    """A rotated model whose schemes have something that was never checked."""
    config = EXAMPLES["position.rope"].model()
    plan = config.layer_plan
    schemes = {name: s.model_copy(update=update) for name, s in plan.schemes.items()}
    return config.model_copy(update={"layer_plan": plan.model_copy(update={"schemes": schemes})})


def with_rope(**update: Any) -> ModelConfig:
    """A rotated model whose rotations have something that was never checked."""
    rope = next(iter(EXAMPLES["position.rope"].model().layer_plan.schemes.values())).position
    return with_scheme(position=rope.model_copy(update=update))


def with_scaling(scaling: Frozen) -> ModelConfig:
    """A rotated model with a scaling that was never checked."""
    return with_rope(scaling=scaling)


def with_fuse(gate: str) -> ModelConfig:
    """A model of two views with a gate that was never checked."""
    config = EXAMPLES["fuse.gate.head"].model()
    plan, schemes = config.layer_plan, {}
    for name, scheme in plan.schemes.items():
        fuse = scheme.fuse.model_copy(update={"gate": gate})
        schemes[name] = scheme.model_copy(update={"fuse": fuse})
    return config.model_copy(update={"layer_plan": plan.model_copy(update={"schemes": schemes})})


def with_norm(**update: str) -> ModelConfig:
    """A model with a QK-norm that was never checked."""
    return with_scheme(qk_norm=QKNorm(kind="rms").model_copy(update=update))


def with_field(**update: str) -> ModelConfig:
    """A model with a field that was never checked."""
    return EXAMPLES["position.rope"].model().model_copy(update=update)


DUMMIES: dict[str, ModelConfig] = {
    "position": with_scheme(position=Alibi()),
    "scaling": with_scaling(Stretched()),
    "spectrum": with_rope(rotary_fraction=0.5, spectrum="other"),
    "score_scale": with_scheme(score_scale=Squared()),
    "qk_norm.kind": with_norm(kind="other"),
    "qk_norm.over": with_norm(over="other"),
    "qk_norm.weight": with_norm(weight="other"),
    "gate": with_scheme(gate="other"),
    "bias": with_scheme(bias="other"),
    "fuse.gate": with_fuse("other"),
    "block": with_field(block="other"),
    "norm": with_field(norm="other"),
    "activation": with_field(activation="other"),
}


def told_of(config: ModelConfig) -> dict[str, str | None]:
    """What each place says of a model by itself, with nothing to compare with; None where it says
    nothing. To tell it from the plain model is to know it for a fingerprint."""
    base = model_fingerprint(EXAMPLES["position.rope"].model())
    found: dict[str, str | None] = {}
    for name, place in PLACES.items():
        try:
            without_oracle(place, config)
            found[name] = None
            if name == "fingerprint" and model_fingerprint(config) != base:
                found[name] = "a fingerprint of its own"
        except PassedSilently:
            found[name] = None
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:200]
    return found


def main() -> None:
    """Print what every place says of every member."""
    warnings.simplefilter("ignore")
    json.dump({name: told_of(config) for name, config in DUMMIES.items()}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
