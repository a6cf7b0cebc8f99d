"""Afmoe (Trinity), all layers dense: a norm on both sides of each function, the attention output
gated by element; sliding layers rotate and full layers do not."""

from collections.abc import Iterator, Sequence
from typing import Any

from megahybrid.config.attention import AttentionScheme, Gate, Nope, QKNorm, Rope
from megahybrid.config.model import ModelConfig
from megahybrid.config.score_scale import SqrtDimScale
from megahybrid.errors import InteropError
from megahybrid.interop.architectures import layers
from megahybrid.interop.architectures.base import MODEL_FIELDS, Serves
from megahybrid.interop.architectures.rope import ROPE_TYPES, Fields
from megahybrid.interop.architectures.stock import StockArchitecture


class Afmoe(StockArchitecture):
    """num_dense_layers is the number of layers: none has experts. mup_enabled multiplies the
    embeddings by the square root of their width, in fp32 by our number for it."""

    name = "Afmoe"
    model_type = "afmoe"
    serves = Serves(
        blocks=("sandwich",),
        norms=("rms",),
        qk_norms=(QKNorm(kind="rms"),),
        positions=(Rope, Nope),
        scalings=ROPE_TYPES,
        score_scales=(SqrtDimScale,),
        gates=("element",),
    )
    model_fields = MODEL_FIELDS | {"embedding_scale"}

    def shape_reasons(self, model: ModelConfig) -> Iterator[str]:
        """Yield also a factor of the embeddings that is no square root of their width."""
        yield from super().shape_reasons(model)
        if model.embedding_scale != 1:
            yield from layers.width_scale_reasons(model)

    def layer_reasons(self, schemes: Sequence[AttentionScheme]) -> Iterator[str]:
        """Yield the reasons where rotation and window do not go together."""
        return layers.sliding_rotates_reasons(schemes)

    def how(self, schemes: Sequence[AttentionScheme]) -> str:
        """Return the fields that tell which layers rotate, and that none has experts."""
        return f"{layers.how_sliding_rotates(schemes)}, num_dense_layers all"

    def export_rank(self, schemes: Sequence[AttentionScheme]) -> int:
        """Return the place among classes that support the same model."""
        return 65

    def layer_fields(self, model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
        """Return which layers rotate, which is which are windowed."""
        return layers.sliding_rotates_fields(schemes, model.head_dim) | {
            "num_dense_layers": len(schemes),
            "mup_enabled": model.embedding_scale != 1,
        }

    def gate(self, config: Any) -> Gate:
        """Return the gate of a config."""
        return "element"

    def layers_of(self, config: Any) -> list[layers.Layer]:
        """Return each layer. Raises InteropError where some have experts."""
        if config.num_dense_layers < config.num_hidden_layers:
            raise InteropError(
                f"config.json: num_dense_layers={config.num_dense_layers} of "
                f"{config.num_hidden_layers} layers: the others have experts, which our model has "
                "not."
            )
        return layers.sliding_rotates(config)

    def function_of(self, config: Any) -> Fields:
        """Return the factor of the embeddings."""
        return {"embedding_scale": float(config.hidden_size**0.5)} if config.mup_enabled else {}
