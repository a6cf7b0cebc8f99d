"""Gemma3, its text model: one rotation for the sliding layers and one for the full ones, norms of
(1 + w) on both sides of each function and of queries and keys, GeGLU, embeddings times the square
root of their width.

Our norms multiply by w, so theirs come in as 1 + w and go out as w - 1 (`TensorName.offset`): what
the class itself computes in fp32. In bf16 it still adds in fp32, while our model rounds the sum:
there, and in the factor of the embeddings, which the class rounds to bf16 (33.94 becomes 34), both
compute within bf16's rounding of each other and not the same bits.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megahybrid.config.attention import AttentionScheme, Nope, QKNorm, Rope
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig
from megahybrid.config.score_scale import FixedScale, SqrtDimScale
from megahybrid.errors import InteropError
from megahybrid.interop.architectures import layers
from megahybrid.interop.architectures.base import MODEL_FIELDS, Serves
from megahybrid.interop.architectures.rope import ROPE_TYPES, Fields, head_dim_of, rope_parameters
from megahybrid.interop.architectures.stock import StockArchitecture

ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}


class Gemma3(StockArchitecture):
    """The class of text alone, model_type gemma3_text: Gemma 3's 270M and 1B, and the text of the
    larger ones. Scores are scaled by query_pre_attn_scalar^-1/2, a whole number."""

    name = "Gemma3"
    model_type = "gemma3_text"
    norm_offset = 1.0
    serves = Serves(
        blocks=("sandwich",),
        norms=("rms",),
        qk_norms=(QKNorm(kind="rms"),),
        positions=(Rope, Nope),
        scalings=ROPE_TYPES,
        score_scales=(SqrtDimScale, FixedScale),
        activations=("silu", "gelu_tanh"),
    )
    model_fields = MODEL_FIELDS | {"embedding_scale", "logit_softcap"}

    def shape_reasons(self, model: ModelConfig) -> Iterator[str]:
        """Yield also that heads must divide the width, and the factor of the embeddings."""
        yield from super().shape_reasons(model)
        if model.hidden_size % model.num_heads:
            yield f"its num_heads divides hidden_size ({model.num_heads}, {model.hidden_size})"
        yield from layers.width_scale_reasons(model)

    def layer_reasons(self, schemes: Sequence[AttentionScheme]) -> Iterator[str]:
        """Yield the reasons against more than one position for each of two kinds of layers, and
        against scales of the scores that it cannot write."""
        yield from layers.two_kinds_reasons(schemes)
        for scale in dict.fromkeys(s.score_scale for s in schemes):
            if isinstance(scale, FixedScale) and _scalar(scale.scale) is None:
                yield f"its scale of the scores is a whole number^-1/2, not {scale.scale:g}"

    def how(self, schemes: Sequence[AttentionScheme]) -> str:
        """Return the field of the rotations."""
        return layers.how_two_kinds(schemes)

    def export_rank(self, schemes: Sequence[AttentionScheme]) -> int:
        """Return the place among classes that support the same model."""
        return 64

    def own_fields(self, model: ModelConfig, plan: LayerPlan) -> Fields:
        """Return the fields that every class has, the activation under this one's name."""
        fields = super().own_fields(model, plan)
        del fields["hidden_act"]
        return fields | {"hidden_activation": ACTIVATIONS[model.activation]}

    def layer_fields(self, model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
        """Return two kinds of layers, the rotation of each, and the scale of the scores."""
        scale = schemes[0].score_scale
        scalar = _scalar(scale.scale) if isinstance(scale, FixedScale) else model.head_dim
        return layers.two_kinds_fields(schemes, lambda p: rope_parameters(p, model.head_dim)) | {
            "query_pre_attn_scalar": scalar,
            "final_logit_softcapping": model.logit_softcap,
            "attn_logit_softcapping": None,
            "use_bidirectional_attention": False,
        }

    def layers_of(self, config: Any) -> list[layers.Layer]:
        """Return layers of two kinds. Raises InteropError where a query sees later keys, or its
        scores have a soft-cap."""
        for field in ("use_bidirectional_attention", "attn_logit_softcapping"):
            if getattr(config, field, None):
                raise InteropError(
                    f"config.json: {field}={getattr(config, field)} is not supported by our model."
                )
        return layers.two_kinds(config)

    def score_scale(self, config: Any) -> Fields:
        """Return the scale by the field query_pre_attn_scalar."""
        if config.query_pre_attn_scalar == head_dim_of(config):
            return {"kind": "sqrt_dim"}
        return {"kind": "fixed", "scale": float(config.query_pre_attn_scalar**-0.5)}

    def function_of(self, config: Any) -> Fields:
        """Return activation, soft-cap and the factor of the embeddings."""
        known = {theirs: ours for ours, theirs in ACTIVATIONS.items()}
        if config.hidden_activation not in known:
            raise InteropError(
                f"config.json: hidden_activation={config.hidden_activation} is not supported by "
                f"our model (only {' and '.join(known)})."
            )
        cap = config.final_logit_softcapping
        return {
            "activation": known[config.hidden_activation],
            "logit_softcap": None if cap is None else float(cap),
            "embedding_scale": float(config.hidden_size**0.5),
        }

    def norm_names(self, model: ModelConfig) -> Mapping[str, str]:
        """Return the class's name of each norm of a block, by ours."""
        return {
            "attention_norm": "input_layernorm",
            "attention_output_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_output_norm": "post_feedforward_layernorm",
        }


def _scalar(scale: float) -> int | None:
    """Return the whole number whose power of -1/2 is this scale to the bit, None without any."""
    scalar = round(scale**-2)
    return scalar if scalar > 0 and scalar**-0.5 == scale else None
