"""Mellum, all layers dense: one position for the sliding layers and one for the full ones; pre-norm
blocks with QK-norm per head."""

from collections.abc import Iterator, Sequence
from typing import Any

from megahybrid.config.attention import AttentionScheme, Nope, QKNorm, Rope
from megahybrid.config.model import ModelConfig
from megahybrid.config.score_scale import SqrtDimScale
from megahybrid.interop.architectures import layers
from megahybrid.interop.architectures.base import Serves
from megahybrid.interop.architectures.rope import ROPE_TYPES, Fields, rope_parameters
from megahybrid.interop.architectures.stock import StockArchitecture


class Mellum(StockArchitecture):
    """mlp_layer_types is dense in every layer. No rotation is a proportional factor of 0."""

    name = "Mellum"
    model_type = "mellum"
    serves = Serves(
        blocks=("pre_norm",),
        norms=("rms",),
        qk_norms=(QKNorm(kind="rms"),),
        positions=(Rope, Nope),
        scalings=ROPE_TYPES,
        score_scales=(SqrtDimScale,),
    )

    def layer_reasons(self, schemes: Sequence[AttentionScheme]) -> Iterator[str]:
        """Yield the reasons against more than one position for each of two kinds of layers."""
        return layers.two_kinds_reasons(schemes)

    def how(self, schemes: Sequence[AttentionScheme]) -> str:
        """Return the field of the rotations, and that no layer has experts."""
        return f"{layers.how_two_kinds(schemes)}, mlp_layer_types all dense"

    def export_rank(self, schemes: Sequence[AttentionScheme]) -> int:
        """Return the place among classes that support the same model."""
        return 54

    def layer_fields(self, model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
        """Return two kinds of layers, and the rotation of each."""
        fields = layers.two_kinds_fields(schemes, lambda p: rope_parameters(p, model.head_dim))
        return fields | {"mlp_layer_types": ["dense"] * len(schemes)}

    def layers_of(self, config: Any) -> list[layers.Layer]:
        """Return layers of two kinds. Raises InteropError where some have experts."""
        layers.dense_or_refused(config)
        return layers.two_kinds(config)
