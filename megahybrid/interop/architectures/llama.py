"""Llama: one rotation in every layer, or none in any; windows that are given are ignored."""

from collections.abc import Iterator, Sequence
from typing import Any

from megahybrid.config.attention import AttentionScheme, Nope, Rope
from megahybrid.config.model import ModelConfig
from megahybrid.config.score_scale import SqrtDimScale
from megahybrid.interop.architectures import layers
from megahybrid.interop.architectures.base import NO_QK_NORM, Serves
from megahybrid.interop.architectures.rope import ROPE_TYPES, Fields, rope_parameters
from megahybrid.interop.architectures.stock import StockArchitecture


class Llama(StockArchitecture):
    """No rotation at all is written as a proportional one of no part."""

    name = "Llama"
    model_type = "llama"
    serves = Serves(
        blocks=("pre_norm",),
        norms=("rms",),
        qk_norms=(NO_QK_NORM,),
        positions=(Rope, Nope),
        scalings=ROPE_TYPES,
        score_scales=(SqrtDimScale,),
    )

    def shape_reasons(self, model: ModelConfig) -> Iterator[str]:
        """Yield also that heads must divide the width."""
        yield from super().shape_reasons(model)
        if model.hidden_size % model.num_heads:
            yield f"its num_heads divides hidden_size ({model.num_heads}, {model.hidden_size})"

    def layer_reasons(self, schemes: Sequence[AttentionScheme]) -> Iterator[str]:
        """Yield the reasons against several rotations and any window: those are silently
        ignored."""
        yield from layers.rotates_everywhere_reasons(schemes)
        if layers.windowed(schemes):
            yield "it ignores windows"

    def how(self, schemes: Sequence[AttentionScheme]) -> str:
        """Return the field of the rotation."""
        return layers.how_rotates_everywhere(schemes)

    def export_rank(self, schemes: Sequence[AttentionScheme]) -> int:
        """Return the last place where no layer rotates: others have a field for it, this needs a
        rotation by nothing."""
        return 30 if any(map(layers.rotates, schemes)) else 100

    def layer_fields(self, model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
        """Return the one rotation."""
        return {
            "mlp_bias": False,
            "pretraining_tp": 1,
            "rope_parameters": rope_parameters(layers.one_position(schemes), model.head_dim),
        }

    def layers_of(self, config: Any) -> list[layers.Layer]:
        """Return the one rotation for each."""
        return layers.rotates_everywhere(config)
