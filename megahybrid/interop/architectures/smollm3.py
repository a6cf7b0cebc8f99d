"""SmolLM3: rotation and window are free of each other, layer by layer."""

from collections.abc import Iterator, Sequence
from typing import Any

from megahybrid.config.attention import AttentionScheme, Nope, Rope
from megahybrid.config.model import ModelConfig
from megahybrid.config.score_scale import SqrtDimScale
from megahybrid.errors import InteropError
from megahybrid.interop.architectures import layers
from megahybrid.interop.architectures.base import NO_QK_NORM, Serves
from megahybrid.interop.architectures.rope import (
    NOPE,
    ROPE_TYPES,
    Fields,
    rope_position,
    switched_rope_parameters,
)
from megahybrid.interop.architectures.stock import StockArchitecture


class SmolLM3(StockArchitecture):
    """In `no_rope_layers` 1 means that the layer uses RoPE."""

    name = "SmolLM3"
    model_type = "smollm3"
    serves = Serves(
        blocks=("pre_norm",),
        norms=("rms",),
        qk_norms=(NO_QK_NORM,),
        positions=(Rope, Nope),
        scalings=ROPE_TYPES,
        score_scales=(SqrtDimScale,),
    )

    def layer_reasons(self, schemes: Sequence[AttentionScheme]) -> Iterator[str]:
        """Yield the reasons against more than one rotation."""
        return layers.one_rotation_reasons(schemes)

    def how(self, schemes: Sequence[AttentionScheme]) -> str:
        """Return the field of rotated layers, and those of windows where there are any."""
        how = "no_rope_layers (1 means that the layer uses RoPE)"
        windows = ", layer_types, use_sliding_window true"
        return how + (windows if layers.windowed(schemes) else "")

    def export_rank(self, schemes: Sequence[AttentionScheme]) -> int:
        """Return the place among classes that support the same model."""
        return 40

    def layer_fields(self, model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
        """Return which layers rotate, and which are windowed."""
        window = layers.one_window(schemes)
        position = layers.one_position(schemes)
        return {
            "mlp_bias": False,
            "layer_types": layers.layer_types([s.window is not None for s in schemes]),
            "no_rope_layers": [int(layers.rotates(s)) for s in schemes],
            "sliding_window": window,
            "use_sliding_window": window is not None,
            "rope_parameters": switched_rope_parameters(position, model.head_dim),
        }

    def layers_of(self, config: Any) -> list[layers.Layer]:
        """Return each layer. Windows without use_sliding_window hold on some devices only:
        refused."""
        rope = rope_position(config.rope_parameters, config)
        if layers.SLIDING in config.layer_types and not config.use_sliding_window:
            raise InteropError(
                "config.json: layer_types has sliding_attention, but use_sliding_window is false: "
                "attention then depends on the kernel. Set use_sliding_window to what is meant."
            )
        window = layers.window_of(config)
        return [
            (rope if uses else NOPE, window if kind == layers.SLIDING else None)
            for uses, kind in zip(config.no_rope_layers, config.layer_types, strict=False)
        ]
