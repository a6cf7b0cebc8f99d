"""GraniteSWA: theta per layer, 0 for none, under one scaling; sinks, learned or switched off;
multipliers of embeddings, of what a block adds, of scores and, as a divisor, of logits."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, assert_never

from megahybrid.config.attention import AttentionScheme, Nope, Rope
from megahybrid.config.model import ModelConfig
from megahybrid.config.scaling import NtkScaling
from megahybrid.config.score_scale import (
    FixedScale,
    Llama4Scale,
    LogFromScale,
    LogScale,
    PowerScale,
    ScoreScale,
    SqrtDimScale,
    SsmaxScale,
)
from megahybrid.errors import InteropError
from megahybrid.interop.architectures import layers
from megahybrid.interop.architectures.base import MODEL_FIELDS, NO_QK_NORM, Serves
from megahybrid.interop.architectures.rope import (
    NOPE,
    ROPE_TYPES,
    Fields,
    head_dim_of,
    rope_parameters,
    rope_position,
)
from megahybrid.interop.architectures.sinks import SinksEverywhere
from megahybrid.interop.architectures.stock import PLAIN_FIELDS

MULTIPLIERS = (
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
)


class GraniteSWA(SinksEverywhere):
    """Its scale of the scores is a field (by default 1), and the logits are divided by one. Each
    layer's theta is put into the one `rope_parameters`."""

    name = "GraniteSWA"
    model_type = "granite_swa"
    serves = Serves(
        blocks=("pre_norm",),
        norms=("rms",),
        qk_norms=(NO_QK_NORM,),
        positions=(Rope, Nope),
        scalings=ROPE_TYPES,
        score_scales=(SqrtDimScale, FixedScale),
        logit_scale=True,
    )
    model_fields = MODEL_FIELDS | {"embedding_scale", "residual_scale"}
    plain_fields: ClassVar[Fields] = {
        field: value for field, value in PLAIN_FIELDS.items() if not field.endswith("_multiplier")
    }

    def layer_reasons(self, schemes: Sequence[AttentionScheme]) -> Iterator[str]:
        """Yield the reasons against rotations that differ in more than theta."""
        yield from layers.partial_reasons(schemes)
        beside_theta = set()
        for rope in layers.rotations(schemes):
            # Static NTK is another theta and nothing else.
            scaling = None if isinstance(rope.scaling, NtkScaling) else rope.scaling
            beside_theta.add((scaling, rope.rotary_fraction, rope.spectrum))
        if len(beside_theta) > 1:
            yield "its rotated layers share one scaling and one rotated part"

    def how(self, schemes: Sequence[AttentionScheme]) -> str:
        """Return the fields, which are the same for every model, and what its sinks are."""
        sinks = self.sinks_in_words(schemes)
        return f"layer_rope_theta with 0 for none, {sinks}, multipliers"

    def export_rank(self, schemes: Sequence[AttentionScheme]) -> int:
        """Return a place behind the classes without sinks, which more programs read."""
        return 90

    def layer_fields(self, model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
        """Return a theta per layer, which layers are windowed, and four multipliers."""
        entries = [_entry(scheme, model.head_dim) for scheme in schemes]
        plain = {"rope_type": "default", "rope_theta": 10000.0}
        return {
            "mlp_bias": False,
            "layer_types": layers.layer_types([s.window is not None for s in schemes]),
            # It makes the mask of a window for any input, whether a layer uses it or not.
            "sliding_window": layers.one_window(schemes) or layers.ENDLESS,
            "layer_rope_theta": [entry["rope_theta"] if entry else 0 for entry in entries],
            "rope_parameters": next((entry for entry in entries if entry), plain),
            "attention_multiplier": _multiplier(schemes[0].score_scale, model.head_dim),
            "logits_scaling": 1.0 / model.logit_scale,
            "embedding_multiplier": model.embedding_scale,
            "residual_multiplier": model.residual_scale,
        }

    def layers_of(self, config: Any) -> list[layers.Layer]:
        """Return a theta per layer, windowed by layer_types. Raises InteropError for a multiplier
        that is not above 0."""
        for field in MULTIPLIERS:
            if not getattr(config, field) > 0:
                raise InteropError(
                    f"config.json: {field}={getattr(config, field)} is not supported by our model "
                    "(only numbers above 0)."
                )
        window = layers.window_of(config)
        positions = {
            theta: rope_position(config.rope_parameters | {"rope_theta": theta}, config)
            for theta in config.layer_rope_theta
            if theta
        }
        return [
            (positions.get(theta, NOPE), window if kind == layers.SLIDING else None)
            for theta, kind in zip(config.layer_rope_theta, config.layer_types, strict=True)
        ]

    def score_scale(self, config: Any) -> Fields:
        """Return the scale in the field attention_multiplier."""
        if config.attention_multiplier == head_dim_of(config) ** -0.5:
            return {"kind": "sqrt_dim"}
        return {"kind": "fixed", "scale": float(config.attention_multiplier)}

    def logit_scale(self, config: Any) -> float:
        """Return the inverse of the field logits_scaling."""
        return 1.0 / config.logits_scaling

    def function_of(self, config: Any) -> Fields:
        """Return the factors of the embeddings and of what a block adds."""
        return {
            "embedding_scale": float(config.embedding_multiplier),
            "residual_scale": float(config.residual_multiplier),
        }


def _entry(scheme: AttentionScheme, head_dim: int) -> Fields | None:
    """Return the rope_parameters of a layer by itself, None without a rotation."""
    position = scheme.position
    match position:
        case Rope():
            return rope_parameters(position, head_dim)
        case Nope():
            return None
        case _:
            assert_never(position)


def _multiplier(scale: ScoreScale, head_dim: int) -> float:
    match scale:
        case SqrtDimScale():
            return float(head_dim**-0.5)
        case FixedScale():
            return scale.scale
        case Llama4Scale() | PowerScale() | LogScale() | LogFromScale() | SsmaxScale():
            raise InteropError(f"GraniteSWA has no score scale of kind {scale.kind}.")
        case _:
            assert_never(scale)
