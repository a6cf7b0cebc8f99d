"""Which architecture of another library can carry a model: the answer that `describe` prints.

`interop.architectures` gives it; config knows the shape of the answer only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig


@dataclass(frozen=True)
class Fit:
    """One architecture and a model: the reasons against it, or how its config carries the model."""

    architecture: str
    reasons: tuple[str, ...]
    how: str = ""

    @property
    def can(self) -> bool:
        """True where nothing speaks against it."""
        return not self.reasons


Fits = Callable[[ModelConfig, LayerPlan], Sequence[Fit]]
