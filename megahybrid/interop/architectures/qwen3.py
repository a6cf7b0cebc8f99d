"""Qwen3: one rotation in every layer, or none in any; windows in any layers; QK-norm per head."""

from collections.abc import Iterator, Sequence
from typing import Any

from megahybrid.config.attention import AttentionScheme, Nope, QKNorm, Rope
from megahybrid.config.model import ModelConfig
from megahybrid.config.score_scale import SqrtDimScale
from megahybrid.interop.architectures import layers
from megahybrid.interop.architectures.base import Serves
from megahybrid.interop.architectures.rope import ROPE_TYPES, Fields, rope_parameters, rope_position
from megahybrid.interop.architectures.stock import StockArchitecture


class Qwen3(StockArchitecture):
    """A window by layer_types, and only with use_sliding_window true."""

    name = "Qwen3"
    model_type = "qwen3"
    serves = Serves(
        blocks=("pre_norm",),
        norms=("rms",),
        qk_norms=(QKNorm(kind="rms"),),
        positions=(Rope, Nope),
        scalings=ROPE_TYPES,
        score_scales=(SqrtDimScale,),
    )

    def layer_reasons(self, schemes: Sequence[AttentionScheme]) -> Iterator[str]:
        """Yield the reasons against several rotations, or one in some layers only."""
        return layers.rotates_everywhere_reasons(schemes)

    def how(self, schemes: Sequence[AttentionScheme]) -> str:
        """Return the fields of the rotation, and of windows where there are any."""
        how = layers.how_rotates_everywhere(schemes)
        windows = ", layer_types, use_sliding_window true"
        return how + (windows if layers.windowed(schemes) else "")

    def export_rank(self, schemes: Sequence[AttentionScheme]) -> int:
        """Return the place among classes that support the same model."""
        return 50

    def layer_fields(self, model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
        """Return the one rotation, and which layers are windowed."""
        window = layers.one_window(schemes)
        return {
            "layer_types": layers.layer_types([s.window is not None for s in schemes]),
            "sliding_window": window,
            "use_sliding_window": window is not None,
            "max_window_layers": len(schemes),
            "rope_parameters": rope_parameters(layers.one_position(schemes), model.head_dim),
        }

    def layers_of(self, config: Any) -> list[layers.Layer]:
        """Return the one rotation for each, windowed by layer_types."""
        rope = rope_position(config.rope_parameters, config)
        window = layers.window_of(config)
        return [(rope, window if t == layers.SLIDING else None) for t in config.layer_types]
