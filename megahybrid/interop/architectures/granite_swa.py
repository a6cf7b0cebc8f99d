"""GraniteSWA: theta per layer, 0 for none; sinks, learned or switched off."""

from collections.abc import Iterator, Sequence
from typing import Any, assert_never

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
from megahybrid.interop.architectures.base import NO_QK_NORM, Serves
from megahybrid.interop.architectures.rope import (
    NOPE,
    Fields,
    head_dim_of,
    rope_parameters,
)
from megahybrid.interop.architectures.sinks import SinksEverywhere


class GraniteSWA(SinksEverywhere):
    """Its scale of the scores is a field (by default 1), and the logits are divided by one."""

    name = "GraniteSWA"
    model_type = "granite_swa"
    serves = Serves(
        blocks=("pre_norm",),
        norms=("rms",),
        qk_norms=(NO_QK_NORM,),
        positions=(Rope, Nope),
        scalings=(NtkScaling,),
        score_scales=(SqrtDimScale, FixedScale),
        logit_scale=True,
        no_scaling="its theta per layer takes no scaling",
    )

    def layer_reasons(self, schemes: Sequence[AttentionScheme]) -> Iterator[str]:
        """Yield a reason against partial rotations; any layer may have any theta."""
        if any(rope.rotary_fraction < 1 for rope in layers.rotations(schemes)):
            yield "its theta per layer takes no partial rotation"

    def how(self, schemes: Sequence[AttentionScheme]) -> str:
        """Return the fields, which are the same for every model, and what its sinks are."""
        sinks = self.sinks_in_words(schemes)
        return f"layer_rope_theta with 0 for none, {sinks}, attention_multiplier"

    def export_rank(self, schemes: Sequence[AttentionScheme]) -> int:
        """Return a place behind the classes without sinks, which more programs read."""
        return 90

    def layer_fields(self, model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
        """Return a theta per layer, which layers are windowed, and four multipliers."""
        thetas = [_theta(scheme, model.head_dim) for scheme in schemes]
        return {
            "mlp_bias": False,
            "layer_types": layers.layer_types([s.window is not None for s in schemes]),
            # It makes the mask of a window for any input, whether a layer uses it or not.
            "sliding_window": layers.one_window(schemes) or layers.ENDLESS,
            "layer_rope_theta": thetas,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": next((theta for theta in thetas if theta), 10000.0),
            },
            "attention_multiplier": _multiplier(schemes[0].score_scale, model.head_dim),
            "logits_scaling": 1.0 / model.logit_scale,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
        }

    def layers_of(self, config: Any) -> list[layers.Layer]:
        """Return a theta per layer, windowed by layer_types."""
        kind = config.rope_parameters.get("rope_type", "default")
        if kind != "default":
            raise InteropError(f"rope_type={kind} with a theta per layer is not supported.")
        window = layers.window_of(config)
        return [
            (
                {"kind": "rope", "theta": float(theta)} if theta else NOPE,
                window if kind == layers.SLIDING else None,
            )
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


def _theta(scheme: AttentionScheme, head_dim: int) -> float:
    position = scheme.position
    match position:
        case Rope():
            theta: float = rope_parameters(position, head_dim)["rope_theta"]
            return theta
        case Nope():
            return 0
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
