"""Olmo2: one rotation in every layer, or none in any; norms of what a branch returns, and of all
heads of queries and of keys together."""

from collections.abc import Iterator, Sequence
from typing import Any

from megahybrid.config.attention import AttentionScheme, Nope, QKNorm, Rope
from megahybrid.config.model import ModelConfig
from megahybrid.config.score_scale import SqrtDimScale
from megahybrid.interop.architectures import layers
from megahybrid.interop.architectures.base import Serves
from megahybrid.interop.architectures.rope import ROPE_TYPES, Fields, rope_parameters
from megahybrid.interop.architectures.stock import StockArchitecture


class Olmo2(StockArchitecture):
    """The layers of Olmo3 without windows. No rotation is a proportional factor of 0."""

    name = "Olmo2"
    model_type = "olmo2"
    serves = Serves(
        blocks=("post_norm",),
        norms=("rms",),
        qk_norms=(QKNorm(kind="rms", over="projection"),),
        positions=(Rope, Nope),
        scalings=ROPE_TYPES,
        score_scales=(SqrtDimScale,),
    )

    def layer_reasons(self, schemes: Sequence[AttentionScheme]) -> Iterator[str]:
        """Yield the reasons against several rotations, and any window: the class has no field for
        one."""
        yield from layers.rotates_everywhere_reasons(schemes)
        if layers.windowed(schemes):
            yield "it has no windows"

    def how(self, schemes: Sequence[AttentionScheme]) -> str:
        """Return the field of the rotation."""
        return layers.how_rotates_everywhere(schemes)

    def export_rank(self, schemes: Sequence[AttentionScheme]) -> int:
        """Return the place among classes that support the same model: before Olmo3, which needs a
        window as long as the sequence where all layers rotate and see everything."""
        return 68

    def layer_fields(self, model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
        """Return the one rotation."""
        position = layers.one_position(schemes)
        return {"rope_parameters": rope_parameters(position, model.head_dim)}

    def layers_of(self, config: Any) -> list[layers.Layer]:
        """Return the one rotation for each."""
        return layers.rotates_everywhere(config)
