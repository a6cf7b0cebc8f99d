"""Exaone4: norms of what a branch returns; sliding layers rotate and full layers do not."""

from collections.abc import Iterator, Sequence
from typing import Any

from megahybrid.config.attention import AttentionScheme, Nope, QKNorm, Rope
from megahybrid.config.model import ModelConfig
from megahybrid.config.score_scale import SqrtDimScale
from megahybrid.interop.architectures import layers
from megahybrid.interop.architectures.base import Serves
from megahybrid.interop.architectures.rope import ROPE_TYPES, Fields
from megahybrid.interop.architectures.stock import StockArchitecture


class Exaone4(StockArchitecture):
    """With sliding_window null every layer is full and rotates."""

    name = "Exaone4"
    model_type = "exaone4"
    serves = Serves(
        blocks=("post_norm",),
        norms=("rms",),
        qk_norms=(QKNorm(kind="rms"),),
        positions=(Rope, Nope),
        scalings=ROPE_TYPES,
        score_scales=(SqrtDimScale,),
    )

    def layer_reasons(self, schemes: Sequence[AttentionScheme]) -> Iterator[str]:
        """Yield the reasons where rotation and window do not go together."""
        return layers.sliding_rotates_reasons(schemes)

    def how(self, schemes: Sequence[AttentionScheme]) -> str:
        """Return the fields that tell which layers rotate."""
        if _rotates_and_sees_everything(schemes):
            return "sliding_window null, all layer_types full"
        return layers.how_sliding_rotates(schemes)

    def export_rank(self, schemes: Sequence[AttentionScheme]) -> int:
        """Return the place among classes that support the same model."""
        return 60

    def layer_fields(self, model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
        """Return which layers rotate, which is which are windowed."""
        fields = layers.sliding_rotates_fields(schemes, model.head_dim)
        if _rotates_and_sees_everything(schemes):
            full = layers.layer_types([False] * len(schemes))
            fields |= {"layer_types": full, "sliding_window": None}
        return fields

    def layers_of(self, config: Any) -> list[layers.Layer]:
        """Return each layer: full ones rotate where no window is given, and only there."""
        if config.sliding_window is None:
            return layers.rotates_everywhere(config)
        return layers.sliding_rotates(config)


def _rotates_and_sees_everything(schemes: Sequence[AttentionScheme]) -> bool:
    return all(layers.rotates(s) and s.window is None for s in schemes)
