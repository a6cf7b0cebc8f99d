"""Cohere2: sliding layers rotate and full layers do not; parallel blocks, and a logit scale."""

from collections.abc import Iterator, Sequence
from typing import Any

from megahybrid.config.attention import AttentionScheme, Nope, Rope
from megahybrid.config.model import ModelConfig
from megahybrid.config.score_scale import SqrtDimScale
from megahybrid.interop.architectures import layers
from megahybrid.interop.architectures.base import NO_QK_NORM, Serves
from megahybrid.interop.architectures.rope import ROPE_TYPES, Fields, switched_rope_parameters
from megahybrid.interop.architectures.stock import StockArchitecture
from megahybrid.interop.architectures.tensor_names import Order, interleaved_pairs


class Cohere2(StockArchitecture):
    """A rotated full layer is a window at least as long as the longest sequence."""

    name = "Cohere2"
    model_type = "cohere2"
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
        """Yield the reasons where rotation and window do not go together."""
        return layers.sliding_rotates_reasons(schemes)

    def how(self, schemes: Sequence[AttentionScheme]) -> str:
        """Return the fields that tell which layers rotate."""
        return layers.how_sliding_rotates(schemes)

    def export_rank(self, schemes: Sequence[AttentionScheme]) -> int:
        """Return the place among classes that support the same model."""
        return 20

    def layer_fields(self, model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
        """Return which layers rotate, which is which are windowed."""
        position = layers.one_position(schemes)
        return {
            "logit_scale": model.logit_scale,
            "layer_types": layers.layer_types([layers.rotates(s) for s in schemes]),
            "sliding_window": layers.one_window(schemes) or layers.ENDLESS,
            "rope_parameters": switched_rope_parameters(position, model.head_dim),
        }

    def layers_of(self, config: Any) -> list[layers.Layer]:
        """Return layers that rotate where they are windowed."""
        return layers.sliding_rotates(config)

    def logit_scale(self, config: Any) -> float:
        """Return the field of that name."""
        return float(config.logit_scale)

    def pair_order(self, head_dim: int, rotary_dim: int) -> Order | None:
        """Return the order of pairs of neighbours."""
        return interleaved_pairs(head_dim, rotary_dim)
