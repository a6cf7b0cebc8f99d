"""Mistral: one rotation, and one window or none, in every layer."""

from collections.abc import Iterator, Sequence
from typing import Any

from megahybrid.config.attention import AttentionScheme, Nope, Rope
from megahybrid.config.model import ModelConfig
from megahybrid.config.score_scale import SqrtDimScale
from megahybrid.interop.architectures import layers
from megahybrid.interop.architectures.base import NO_QK_NORM, Serves
from megahybrid.interop.architectures.rope import ROPE_TYPES, Fields, rope_parameters, rope_position
from megahybrid.interop.architectures.stock import StockArchitecture


class Mistral(StockArchitecture):
    """A window is every layer's: with layer_types transformers reads the config as another class.
    No rotation is a proportional factor of 0."""

    name = "Mistral"
    model_type = "mistral"
    serves = Serves(
        blocks=("pre_norm",),
        norms=("rms",),
        qk_norms=(NO_QK_NORM,),
        positions=(Rope, Nope),
        scalings=ROPE_TYPES,
        score_scales=(SqrtDimScale,),
    )

    def layer_reasons(self, schemes: Sequence[AttentionScheme]) -> Iterator[str]:
        """Yield the reasons against layers that differ."""
        yield from layers.rotates_everywhere_reasons(schemes)
        if len({scheme.window for scheme in schemes}) > 1:
            yield "it has one window in every layer, or none"

    def how(self, schemes: Sequence[AttentionScheme]) -> str:
        """Return the fields of the rotation and the window."""
        window = ", sliding_window" if layers.windowed(schemes) else ", sliding_window null"
        return layers.how_rotates_everywhere(schemes) + window

    def export_rank(self, schemes: Sequence[AttentionScheme]) -> int:
        """Return the place among classes that support the same model."""
        return 35 if any(map(layers.rotates, schemes)) else 105

    def layer_fields(self, model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
        """Return the one rotation and the one window."""
        return {
            "sliding_window": layers.one_window(schemes),
            "rope_parameters": rope_parameters(layers.one_position(schemes), model.head_dim),
        }

    def layers_of(self, config: Any) -> list[layers.Layer]:
        """Return the one rotation for each, windowed where the config has a window."""
        rope = rope_position(config.rope_parameters, config)
        return [(rope, layers.window_of(config))] * config.num_hidden_layers
