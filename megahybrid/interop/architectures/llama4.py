"""Llama 4's text model, all layers dense: any layer sees a chunk or all keys; layers that rotate
may have a QK-norm without a weight, and those that do not a temperature.

The class norms queries and keys after the rotation, our model before: a rotation keeps norms, so
both are the same function where no attention factor scales them. It counts chunks and positions
from the start of a row, our model from the start of a document: the same for one document a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from megahybrid.config.attention import AttentionScheme, Nope, QKNorm, Rope, rotation_of
from megahybrid.config.base import dump
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig
from megahybrid.config.score_scale import Llama4Scale, SqrtDimScale
from megahybrid.errors import InteropError
from megahybrid.interop.architectures import layers, tensor_names
from megahybrid.interop.architectures.base import (
    NO_QK_NORM,
    SCHEME_FIELDS,
    Serves,
    same_or_refused,
)
from megahybrid.interop.architectures.rope import (
    NOPE,
    ROPE_TYPES,
    Fields,
    rope_position,
    switched_rope_parameters,
)
from megahybrid.interop.architectures.stock import StockArchitecture
from megahybrid.interop.architectures.tensor_names import Order, TensorName

CHUNKED = "chunked_attention"
WEIGHTLESS = QKNorm(kind="rms", weight="none")


class Llama4(StockArchitecture):
    """`moe_layers` is empty; in `no_rope_layers` 1 means that the layer uses RoPE."""

    name = "Llama4"
    model_type = "llama4_text"
    scheme_fields = SCHEME_FIELDS | {"chunk"}
    serves = Serves(
        blocks=("pre_norm",),
        norms=("rms",),
        qk_norms=(NO_QK_NORM, WEIGHTLESS),
        positions=(Rope, Nope),
        scalings=ROPE_TYPES,
        score_scales=(SqrtDimScale, Llama4Scale),
        per_layer=True,
    )

    def layer_reasons(self, schemes: Sequence[AttentionScheme]) -> Iterator[str]:
        """Yield the reasons where norm, chunk and temperature do not follow from the rotation."""
        yield from layers.one_rotation_reasons(schemes)
        if layers.windowed(schemes):
            yield "it has no window"
        if len({s.chunk for s in schemes} - {None}) > 1:
            yield "its layers have one chunk"
        rotated = [s for s in schemes if layers.rotates(s)]
        unrotated = [s for s in schemes if not layers.rotates(s)]
        norms = {s.qk_norm for s in rotated}
        if len(norms) > 1:
            yield "its QK-norm is the same in every layer with rotation"
        if norms == {WEIGHTLESS} and any(map(_attention_factor, rotated)):
            yield "its QK-norm undoes an attention factor"
        if any(s.qk_norm.kind != "none" for s in unrotated):
            yield "its layers without rotation have no QK-norm"
        if any(isinstance(s.score_scale, Llama4Scale) for s in rotated):
            yield "its layers with rotation have no temperature"
        scales = {s.score_scale for s in unrotated}
        if len(scales) > 1:
            yield "its temperature is the same in every layer without rotation"
        if any(isinstance(scale, Llama4Scale) and scale.offset != 1 for scale in scales):
            yield "its temperature has offset 1"

    def how(self, schemes: Sequence[AttentionScheme]) -> str:
        """Return the fields that carry rotation, chunk, norm and temperature."""
        fields = ["no_rope_layers (1 means that the layer uses RoPE)"]
        if any(s.chunk is not None for s in schemes):
            fields.append("layer_types with attention_chunk_size")
        if any(s.qk_norm.kind != "none" for s in schemes):
            fields.append("use_qk_norm true")
        if any(isinstance(s.score_scale, Llama4Scale) for s in schemes):
            fields.append("attn_temperature_tuning true")
        return ", ".join([*fields, "moe_layers empty"])

    def export_rank(self, schemes: Sequence[AttentionScheme]) -> int:
        """Return the place among classes that support the same model: behind all others."""
        return 110

    def own_fields(self, model: ModelConfig, plan: LayerPlan) -> Fields:
        """Return the fields of every class; the width of a dense MLP has a name of its own."""
        return super().own_fields(model, plan) | {"intermediate_size_mlp": model.intermediate_size}

    def layer_fields(self, model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
        """Return which layers rotate, which have chunks, and the temperature of the others."""
        scales = [s.score_scale for s in schemes if isinstance(s.score_scale, Llama4Scale)]
        temperature = scales[0] if scales else Llama4Scale(kind="llama4")
        position = layers.one_position(schemes)
        return {
            "moe_layers": [],
            "no_rope_layers": [int(layers.rotates(s)) for s in schemes],
            "layer_types": [layers.FULL if s.chunk is None else CHUNKED for s in schemes],
            "attention_chunk_size": next((s.chunk for s in schemes if s.chunk is not None), None),
            "use_qk_norm": any(s.qk_norm.kind != "none" for s in schemes),
            "attn_temperature_tuning": bool(scales),
            "floor_scale": temperature.floor,
            "attn_scale": temperature.coefficient,
            "rope_parameters": switched_rope_parameters(position, model.head_dim),
        }

    def layers_of(self, config: Any) -> list[layers.Layer]:
        """Return the position of each layer. Raises InteropError where some have experts."""
        if config.moe_layers:
            raise InteropError(
                f"config.json: moe_layers={config.moe_layers}: these layers have experts, which "
                "our model has not (only [])."
            )
        rope = rope_position(config.rope_parameters, config)
        rotated = config.no_rope_layers[: config.num_hidden_layers]
        return [(rope if uses else NOPE, None) for uses in rotated]

    def qk_norm(self, config: Any) -> QKNorm:
        """Return none: `layer_extras` gives rotated layers theirs."""
        return NO_QK_NORM

    def layer_extras(self, config: Any) -> Sequence[Fields]:
        """Return the chunk, norm and temperature of each layer."""
        chunk = config.attention_chunk_size
        if chunk is None and CHUNKED in config.layer_types:
            raise InteropError(
                "config.json: layer_types has chunked_attention, but attention_chunk_size is null. "
                "Set it to what is meant."
            )
        if chunk is not None and chunk < 2:
            raise InteropError(
                f"config.json: attention_chunk_size={chunk}: transformers' own cache is wrong for "
                "chunks below 2 keys."
            )
        temperature = {
            "kind": "llama4",
            "floor": config.floor_scale,
            "coefficient": config.attn_scale,
        }
        extras = []
        for uses, kind in zip(config.no_rope_layers, config.layer_types, strict=False):
            fields: Fields = {"chunk": chunk} if kind == CHUNKED else {}
            if uses and config.use_qk_norm:
                fields["qk_norm"] = dump(WEIGHTLESS)
            if not uses and config.attn_temperature_tuning:
                fields["score_scale"] = temperature
            extras.append(fields)
        return extras[: config.num_hidden_layers]

    def from_config(self, config: Any) -> ModelConfig:
        """Return the model of a config, or raise, as Architecture describes it."""
        model = super().from_config(config)
        if config.use_qk_norm and any(map(_attention_factor, model.layer_plan.schemes.values())):
            raise InteropError(
                "config.json: rope_parameters has an attention factor, which use_qk_norm=true "
                "undoes, because the class norms after the rotation. Set attention_factor to 1."
            )
        return model

    def intermediate_size(self, config: Any) -> int:
        """Return the width of a dense MLP; that of the experts is another field."""
        return int(config.intermediate_size_mlp)

    def shrink(self, config: Any, plan: LayerPlan, small: LayerPlan) -> None:
        """Change chunk and temperature of a config of `plan` into those of `small`, or raise, as
        Architecture describes it."""
        chunks = {s.chunk: small.schemes[name].chunk for name, s in plan.schemes.items()}
        chunks.pop(None, None)
        for whole, less in chunks.items():
            same_or_refused("attention_chunk_size", config.attention_chunk_size, whole)
            config.attention_chunk_size = less
        for name, scheme in plan.schemes.items():
            less_scale = small.schemes[name].score_scale
            if isinstance(scheme.score_scale, Llama4Scale) and isinstance(less_scale, Llama4Scale):
                same_or_refused("floor_scale", config.floor_scale, scheme.score_scale.floor)
                config.floor_scale = less_scale.floor
                break  # the other layers have the same one

    def pair_order(self, head_dim: int, rotary_dim: int) -> Order | None:
        """Return the order of pairs (2i, 2i + 1)."""
        return tensor_names.interleaved_pairs(head_dim, rotary_dim)

    def tensor_names(self, model: ModelConfig, plan: LayerPlan) -> Iterator[TensorName]:
        """Yield every tensor; the class calls an MLP feed_forward."""
        for name in super().tensor_names(model, plan):
            yield replace(name, theirs=name.theirs.replace(".mlp.", ".feed_forward."))


def _attention_factor(scheme: AttentionScheme) -> bool:
    """True where a scaling multiplies cos and sin by another number than 1."""
    rope = rotation_of(scheme.position)
    scaling = None if rope is None else rope.scaling
    return scaling is not None and scaling.attention_factor_value() != 1
