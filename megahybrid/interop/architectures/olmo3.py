"""Olmo3: one position for the sliding layers and one for the full ones; norms of what a branch
returns, and of all heads of queries and of keys together."""

from collections.abc import Iterator, Sequence
from typing import Any

from megahybrid.config.attention import AttentionScheme, Nope, QKNorm, Rope
from megahybrid.config.model import ModelConfig
from megahybrid.config.scaling import YarnScaling
from megahybrid.config.score_scale import SqrtDimScale
from megahybrid.interop.architectures import layers
from megahybrid.interop.architectures.base import Serves
from megahybrid.interop.architectures.layers import FULL, SLIDING
from megahybrid.interop.architectures.rope import ROPE_TYPES, Fields, rope_parameters, rope_position
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
        kinds = [[s for s in schemes if (s.window is None) == full] for full in (False, True)]
        if not layers.windowed(schemes):
            if len({s.position for s in schemes}) > 2:
                yield "it has two kinds of layers"
        elif any(len({s.position for s in kind}) > 1 for kind in kinds):
            yield "its sliding layers share one position, and its full layers another"
        yield from layers.partial_reasons(schemes)
        scalings = [rope.scaling for rope in layers.rotations(schemes)]
        if any(isinstance(s, YarnScaling) and not s.truncate for s in scalings):
            yield "it ignores yarn's truncate: false for a kind of layers"

    def how(self, schemes: Sequence[AttentionScheme]) -> str:
        """Return the field of the rotations, and the window where it only makes two kinds of
        layers."""
        how = "rope_parameters for each kind of layer"
        if not layers.windowed(schemes) and len({s.position for s in schemes}) > 1:
            how += ", sliding_window at least the longest sequence"
        return how

    def export_rank(self, schemes: Sequence[AttentionScheme]) -> int:
        """Return the place among classes that support the same model."""
        return 70

    def layer_fields(self, model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
        """Return two kinds of layers, and the rotation of each."""
        window = layers.one_window(schemes)
        if window is None:
            sliding = [s.position != schemes[0].position for s in schemes]
        else:
            sliding = [s.window is not None for s in schemes]
        positions = {
            kind: [s.position for s, item in zip(schemes, sliding, strict=True) if item == which]
            for kind, which in ((SLIDING, True), (FULL, False))
        }
        return {
            "layer_types": layers.layer_types(sliding),
            "sliding_window": window or layers.ENDLESS,
            "rope_parameters": {
                # A kind that no layer has must have an entry all the same.
                kind: rope_parameters((held or [schemes[0].position])[0], model.head_dim)
                for kind, held in positions.items()
            },
        }

    def layers_of(self, config: Any) -> list[layers.Layer]:
        """Return layers of two kinds; a `truncate` in a kind's own entry is ignored."""
        window = layers.window_of(config)
        entries = {
            kind: {key: value for key, value in entry.items() if key != "truncate"}
            for kind, entry in config.rope_parameters.items()
        }
        return [
            (rope_position(entries[kind], config), window if kind == SLIDING else None)
            for kind in config.layer_types
        ]
