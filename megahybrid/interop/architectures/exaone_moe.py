"""ExaoneMoe, all layers dense: pre-norm blocks with QK-norm per head; sliding layers rotate and
full layers do not."""

from collections.abc import Iterator, Sequence
from typing import Any

from megahybrid.config.attention import AttentionScheme, Nope, QKNorm, Rope
from megahybrid.config.model import ModelConfig
from megahybrid.config.score_scale import SqrtDimScale
from megahybrid.interop.architectures import layers
from megahybrid.interop.architectures.base import Serves
from megahybrid.interop.architectures.rope import ROPE_TYPES, Fields
from megahybrid.interop.architectures.stock import StockArchitecture


class ExaoneMoe(StockArchitecture):
    """mlp_layer_types is dense in every layer. Its window is never null, so a rotated full layer is
    a window at least as long as the longest sequence."""

    name = "ExaoneMoe"
    model_type = "exaone_moe"
    serves = Serves(
        blocks=("pre_norm",),
        norms=("rms",),
        qk_norms=(QKNorm(kind="rms"),),
        positions=(Rope, Nope),
        scalings=ROPE_TYPES,
        score_scales=(SqrtDimScale,),
    )

    def layer_reasons(self, schemes: Sequence[AttentionScheme]) -> Iterator[str]:
        """Yield the reasons where rotation and window do not go together."""
        return layers.sliding_rotates_reasons(schemes)

    def how(self, schemes: Sequence[AttentionScheme]) -> str:
        """Return the fields that tell which layers rotate, and that none has experts."""
        return f"{layers.how_sliding_rotates(schemes)}, mlp_layer_types all dense"

    def export_rank(self, schemes: Sequence[AttentionScheme]) -> int:
        """Return the place among classes that support the same model."""
        return 52

    def layer_fields(self, model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
        """Return which layers rotate, which is which are windowed."""
        return layers.sliding_rotates_fields(schemes, model.head_dim) | {
            # Programs read one or the other.
            "mlp_layer_types": ["dense"] * len(schemes),
            "first_k_dense_replace": len(schemes),
        }

    def layers_of(self, config: Any) -> list[layers.Layer]:
        """Return layers that rotate where they are windowed. Raises InteropError where some have
        experts."""
        layers.dense_or_refused(config)
        return layers.sliding_rotates(config)
