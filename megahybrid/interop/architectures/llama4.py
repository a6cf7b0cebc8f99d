"""Llama 4's text model, all layers dense: rotated layers see a chunk or all keys, layers without
rotation see all keys, with a temperature or without.

The class counts chunks from the start of a row, our model from the start of a document: the same
for one document a row.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from megahybrid.config.attention import AttentionScheme, LayerPlan, Nope, QKNorm, Rope
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
        if any(rope.rotary_fraction < 1 for rope in layers.rotations(schemes)):
            yield "it rotates whole heads"
        if layers.windowed(schemes):
            yield "it has no window"
        rotated = [s for s in schemes if layers.rotates(s)]
        still = [s for s in schemes if not layers.rotates(s)]
        if len({s.chunk for s in schemes} - {None}) > 1:
            yield "its layers have one chunk"
        if len({s.qk_norm for s in rotated}) > 1:
            yield "its QK-norm is the same in every layer with rotation"
        if any(s.qk_norm.kind != "none" for s in still):
            yield "its layers without rotation have no QK-norm"
        if any(isinstance(s.score_scale, Llama4Scale) for s in rotated):
            yield "its layers with rotation have no temperature"
        if len({s.score_scale for s in still}) > 1:
            yield "its temperature is the same in every layer without rotation"
        if any(isinstance(s.score_scale, Llama4Scale) and not s.score_scale.offset for s in still):
            yield "its temperature has offset 1"

    def how(self, schemes: Sequence[AttentionScheme]) -> str:
        """Return the fields that carry rotation, chunk and temperature."""
        return (
            "no_rope_layers (1 means that the layer uses RoPE), layer_types with "
            "attention_chunk_size, use_qk_norm, attn_temperature_tuning, moe_layers empty"
        )

    def export_rank(self, schemes: Sequence[AttentionScheme]) -> int:
        """Return the place among classes that support the same model: behind all others."""
        return 110

    def own_fields(self, model: ModelConfig, plan: LayerPlan) -> Fields:
        """Return the fields of every class; the width of a dense MLP has a name of its own."""
        return super().own_fields(model, plan) | {"intermediate_size_mlp": model.intermediate_size}

    def layer_fields(self, model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
        """Return which layers rotate, which have chunks, and the temperature of the others."""
        scales = [s.score_scale for s in schemes if isinstance(s.score_scale, Llama4Scale)]
        chunk = next((s.chunk for s in schemes if s.chunk is not None), None)
        temperature = scales[0] if scales else Llama4Scale(kind="llama4")
        position = layers.one_position(schemes)
        return {
            "moe_layers": [],
            "no_rope_layers": [int(layers.rotates(s)) for s in schemes],
            "layer_types": [CHUNKED if s.chunk is not None else layers.FULL for s in schemes],
            "attention_chunk_size": chunk,
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
        return [(rope if uses else NOPE, None) for uses in config.no_rope_layers]

    def from_config(self, config: Any) -> ModelConfig:
        """Return the model of a config: chunk, norm and temperature are those of its layer."""
        from megahybrid.config.parsing import parse

        model = super().from_config(config)
        schemes, names = {}, []
        scale = {
            "kind": "llama4",
            "floor": int(config.floor_scale),
            "coefficient": float(config.attn_scale),
        }
        kinds = zip(config.no_rope_layers, config.layer_types, strict=False)
        for (uses, kind), plain in zip(kinds, model.layer_plan.expand(), strict=True):
            chunked = kind == CHUNKED
            name = ("rope" if uses else "nope") + ("_chunk" if chunked else "")
            names.append(name)
            update: Fields = {"chunk": config.attention_chunk_size if chunked else None}
            if uses and config.use_qk_norm:
                update["qk_norm"] = WEIGHTLESS
            if not uses and config.attn_temperature_tuning:
                update["score_scale"] = parse(Llama4Scale, scale, where="score_scale")
            schemes[name] = plain.model_copy(update=update)
        pattern = layers.shortest_period(names)
        plan = LayerPlan(num_layers=len(names), pattern=pattern, schemes=schemes)
        return model.model_copy(
            update={"layer_plan": plan, "intermediate_size": config.intermediate_size_mlp}
        )

    def qk_norm(self, config: Any) -> QKNorm:
        """Return none: `from_config` gives rotated layers theirs."""
        return NO_QK_NORM

    def shrink(self, config: Any, plan: LayerPlan, small: LayerPlan) -> None:
        """Change chunk and temperature, after a comparison."""
        for (name, whole), less in zip(plan.schemes.items(), small.schemes.values(), strict=True):
            assert small.schemes[name] is less
            if whole.chunk is not None:
                if config.attention_chunk_size != less.chunk:
                    same_or_refused(
                        "attention_chunk_size", config.attention_chunk_size, whole.chunk
                    )
                config.attention_chunk_size = less.chunk
            if isinstance(less.score_scale, Llama4Scale):
                config.floor_scale = less.score_scale.floor

    def pair_order(self, head_dim: int, rotary_dim: int) -> Order | None:
        """Return the order of pairs (2i, 2i + 1)."""
        return tensor_names.interleaved_pairs(head_dim, rotary_dim)

    def tensor_names(self, model: ModelConfig, plan: LayerPlan) -> Iterator[TensorName]:
        """Yield every tensor; the class calls an MLP feed_forward."""
        for name in super().tensor_names(model, plan):
            theirs = name.theirs.replace(".mlp.", ".feed_forward.")
            yield TensorName(name.ours, theirs, name.shape, name.order, name.constant)
