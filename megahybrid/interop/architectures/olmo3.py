"""Olmo3: one position for the sliding layers and one for the full ones; norms of what a branch
returns, and of all heads of queries and of keys together."""

from collections.abc import Iterator, Sequence
from typing import Any

from megahybrid.config.attention import AttentionScheme, Nope, QKNorm, Rope
from megahybrid.config.model import ModelConfig
from megahybrid.config.score_scale import SqrtDimScale
from megahybrid.interop.architectures import layers
from megahybrid.interop.architectures.base import Serves
from megahybrid.interop.architectures.rope import ROPE_TYPES, Fields, rope_parameters
from megahybrid.interop.architectures.stock import StockArchitecture


class Olmo3(StockArchitecture):
    """No rotation is a proportional factor of 0. Without windows the rotated layers can be sliding
    ones as long as the sequence."""

    name = "Olmo3"
    model_type = "olmo3"
    serves = Serves(
        blocks=("post_norm",),
        norms=("rms",),
        qk_norms=(QKNorm(kind="rms", over="projection"),),
        positions=(Rope, Nope),
        scalings=ROPE_TYPES,
        score_scales=(SqrtDimScale,),
    )

    def layer_reasons(self, schemes: Sequence[AttentionScheme]) -> Iterator[str]:
        """Yield the reasons against more than one position for each of two kinds of layers."""
        return layers.two_kinds_reasons(schemes)

    def how(self, schemes: Sequence[AttentionScheme]) -> str:
        """Return the field of the rotations."""
        return layers.how_two_kinds(schemes)

    def export_rank(self, schemes: Sequence[AttentionScheme]) -> int:
        """Return the place among classes that support the same model."""
        return 70

    def layer_fields(self, model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
        """Return two kinds of layers, and the rotation of each."""
        return layers.two_kinds_fields(schemes, lambda p: rope_parameters(p, model.head_dim))

    def layers_of(self, config: Any) -> list[layers.Layer]:
        """Return layers of two kinds."""
        return layers.two_kinds(config)
