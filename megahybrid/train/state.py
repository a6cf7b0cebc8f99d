"""All that training remembers besides the weights: small, JSON-able, the same on every rank."""

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class TrainState:
    """Steps and tokens done, and where each source's lanes stand. Stage, learning rate, length and
    batch size are functions of `tokens` (config/stages.py)."""

    KEPT: ClassVar = ("step", "tokens", "data", "skipped_in_a_row")  # by every checkpoint of a run

    step: int = 0
    tokens: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    skipped_in_a_row: int = 0
    # Loss and gradient norm of the last steps, where optimizer.skip_spikes judges by them.
    recent: tuple[tuple[float, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the state as a checkpoint's manifest keeps it."""
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> "TrainState":
        """The state a manifest holds."""
        recent = tuple((loss, norm) for loss, norm in value.get("recent", ()))
        return TrainState(**{name: value[name] for name in TrainState.KEPT}, recent=recent)
