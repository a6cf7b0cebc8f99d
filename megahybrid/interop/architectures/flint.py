"""Flint, all layers dense: pre-norm blocks with QK-norm per head and sinks; sliding layers rotate
and full layers do not."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from megahybrid.config.attention import AttentionScheme, Nope, QKNorm, Rope
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig
from megahybrid.config.score_scale import SqrtDimScale
from megahybrid.errors import InteropError
from megahybrid.interop.architectures import layers
from megahybrid.interop.architectures.base import Serves
from megahybrid.interop.architectures.rope import ROPE_TYPES, Fields
from megahybrid.interop.architectures.sinks import SinksEverywhere
from megahybrid.interop.architectures.tensor_names import TensorName


class Flint(SinksEverywhere):
    """mlp_only_layers names every layer. A rotated full layer is a window at least as long as the
    longest sequence."""

    name = "Flint"
    model_type = "flint"
    serves = Serves(
        blocks=("pre_norm",),
        norms=("rms",),
        qk_norms=(QKNorm(kind="rms"),),
        positions=(Rope, Nope),
        scalings=ROPE_TYPES,
        score_scales=(SqrtDimScale,),
    )

    def file_name(self, name: str) -> str:
        """Return a name in files, where sinks have another."""
        return name.replace(".self_attn.sinks", ".self_attn.softmax_offset")

    def tensor_names(self, model: ModelConfig, plan: LayerPlan) -> Iterator[TensorName]:
        """Yield every tensor under both names, theirs as files have it."""
        for name in super().tensor_names(model, plan):
            yield replace(name, theirs=self.file_name(name.theirs))

    def layer_reasons(self, schemes: Sequence[AttentionScheme]) -> Iterator[str]:
        """Yield the reasons where rotation and window do not go together."""
        return layers.sliding_rotates_reasons(schemes)

    def how(self, schemes: Sequence[AttentionScheme]) -> str:
        """Return the fields that tell which layers rotate, and that none has experts."""
        how = layers.how_sliding_rotates(schemes)
        return f"{how}, mlp_only_layers all, {self.sinks_in_words(schemes)}"

    def export_rank(self, schemes: Sequence[AttentionScheme]) -> int:
        """Return a place behind the classes without sinks, which more programs read."""
        return 91

    def layer_fields(self, model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
        """Return which layers rotate, which is which are windowed, and that none has experts."""
        return layers.sliding_rotates_fields(schemes, model.head_dim) | {
            "mlp_only_layers": list(range(len(schemes))),
            "decoder_sparse_step": 1,
            "num_experts": 0,
            "output_router_logits": False,
        }

    def layers_of(self, config: Any) -> list[layers.Layer]:
        """Return layers that rotate where they are windowed. Raises InteropError where some have
        experts."""
        sparse = [
            index
            for index in range(config.num_hidden_layers)
            if index not in config.mlp_only_layers
            and config.num_experts > 0
            and (index + 1) % config.decoder_sparse_step == 0
        ]
        if sparse:
            raise InteropError(
                f"config.json: mlp_only_layers={config.mlp_only_layers} makes layer {sparse[0]} "
                "one of experts, which our model has not (only dense)."
            )
        return layers.sliding_rotates(config)
