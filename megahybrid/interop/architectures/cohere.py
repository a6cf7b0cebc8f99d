"""Cohere, the older class: RoPE in every layer, no window, a LayerNorm of queries and keys."""

from collections.abc import Iterator, Sequence
from typing import Any

from megahybrid.config.attention import AttentionScheme, QKNorm, Rope
from megahybrid.config.model import ModelConfig
from megahybrid.config.score_scale import SqrtDimScale
from megahybrid.interop.architectures import layers
from megahybrid.interop.architectures.base import NO_QK_NORM, Serves
from megahybrid.interop.architectures.rope import ROPE_TYPES, Fields, rope_parameters
from megahybrid.interop.architectures.stock import StockArchitecture
from megahybrid.interop.architectures.tensor_names import Order, interleaved_pairs

PER_HEAD_LAYERNORM = QKNorm(kind="layernorm", weight="per_head")


class Cohere(StockArchitecture):
    """The norm of queries and keys can be switched off."""

    name = "Cohere"
    model_type = "cohere"
    serves = Serves(
        blocks=("parallel",),
        norms=("layernorm",),
        qk_norms=(NO_QK_NORM, PER_HEAD_LAYERNORM),
        positions=(Rope,),
        scalings=ROPE_TYPES,
        score_scales=(SqrtDimScale,),
        logit_scale=True,
        no_position="it rotates in every layer",
    )

    def layer_reasons(self, schemes: Sequence[AttentionScheme]) -> Iterator[str]:
        """Yield the reasons against several rotations and any window."""
        yield from layers.one_rotation_reasons(schemes)
        if layers.windowed(schemes):
            yield "it has no windows"

    def how(self, schemes: Sequence[AttentionScheme]) -> str:
        """Return the switch of the norm."""
        has_norm = schemes[0].qk_norm.kind != "none"
        return "use_qk_norm true" if has_norm else "use_qk_norm false"

    def export_rank(self, schemes: Sequence[AttentionScheme]) -> int:
        """Return the place among classes that support the same model."""
        return 10

    def layer_fields(self, model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
        """Return the one rotation, and the switch of the norm."""
        return {
            "logit_scale": model.logit_scale,
            "use_qk_norm": schemes[0].qk_norm.kind != "none",
            "rope_parameters": rope_parameters(layers.one_position(schemes), model.head_dim),
        }

    def layers_of(self, config: Any) -> list[layers.Layer]:
        """Return the one rotation for each."""
        return layers.rotates_everywhere(config)

    def qk_norm(self, config: Any) -> QKNorm:
        """Return the norm that the switch tells."""
        return PER_HEAD_LAYERNORM if config.use_qk_norm else NO_QK_NORM

    def logit_scale(self, config: Any) -> float:
        """Return the field of that name."""
        return float(config.logit_scale)

    def pair_order(self, head_dim: int, rotary_dim: int) -> Order | None:
        """Return the order of pairs of neighbours."""
        return interleaved_pairs(head_dim, rotary_dim)
