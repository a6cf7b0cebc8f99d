"""CohereCompass, its text model: parallel blocks, and one position for the sliding layers and one
for the full ones, null for none."""

from collections.abc import Iterator, Sequence
from typing import Any, assert_never

from megahybrid.config.attention import AttentionScheme, Nope, Position, Rope
from megahybrid.config.model import ModelConfig
from megahybrid.config.score_scale import SqrtDimScale
from megahybrid.interop.architectures import layers
from megahybrid.interop.architectures.base import NO_QK_NORM, Serves
from megahybrid.interop.architectures.rope import ROPE_TYPES, Fields, rope_parameters
from megahybrid.interop.architectures.stock import StockArchitecture


class CohereCompass(StockArchitecture):
    """Its text model alone, which is its class for causal language models: a rotation for images
    has the same angles on text."""

    name = "CohereCompass"
    model_type = "cohere_compass_text"
    serves = Serves(
        blocks=("parallel",),
        norms=("layernorm",),
        qk_norms=(NO_QK_NORM,),
        positions=(Rope, Nope),
        scalings=ROPE_TYPES,
        score_scales=(SqrtDimScale,),
        logit_scale=True,
    )

    def layer_reasons(self, schemes: Sequence[AttentionScheme]) -> Iterator[str]:
        """Yield the reasons against more than one position for each of two kinds of layers."""
        return layers.two_kinds_reasons(schemes)

    def how(self, schemes: Sequence[AttentionScheme]) -> str:
        """Return the field of the rotations."""
        how = layers.how_two_kinds(schemes)
        return how + ("" if all(map(layers.rotates, schemes)) else ", null for none")

    def export_rank(self, schemes: Sequence[AttentionScheme]) -> int:
        """Return the place among classes that support the same model."""
        return 25

    def layer_fields(self, model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
        """Return two kinds of layers, and the rotation of each."""
        fields = layers.two_kinds_fields(schemes, lambda p: _entry(p, model.head_dim))
        return fields | {"logit_scale": model.logit_scale}

    def layers_of(self, config: Any) -> list[layers.Layer]:
        """Return layers of two kinds."""
        return layers.two_kinds(config)

    def logit_scale(self, config: Any) -> float:
        """Return the field of that name, which may be null."""
        return 1.0 if config.logit_scale is None else float(config.logit_scale)


def _entry(position: Position, head_dim: int) -> Fields | None:
    match position:
        case Nope():
            return None
        case Rope():
            return rope_parameters(position, head_dim)
        case _:
            assert_never(position)
