"""Our own class, which goes along with an export as code: every layer has a scheme.

It keeps our order of the rows, and a rotation is its fp32 frequencies, which JSON keeps to the bit.
"""

from collections.abc import Iterator, Sequence
from typing import Any, assert_never

from megahybrid.config.attention import AttentionScheme, Nope, Position, QKNorm, Rope
from megahybrid.config.base import dump
from megahybrid.config.first_fields import first_fields
from megahybrid.config.fusion import Fuse
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig
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
from megahybrid.interop.architectures.base import (
    MODEL_FIELDS,
    SCHEME_FIELDS,
    Architecture,
    Serves,
    same_or_refused,
)
from megahybrid.interop.architectures.rope import Fields
from megahybrid.interop.architectures.tensor_names import Order


class Megahybrid(Architecture):
    """Every scheme that the code in interop/remote_code computes."""

    name = "Megahybrid"
    model_type = "megahybrid"
    code_files = (
        "cache_megahybrid.py",
        "configuration_megahybrid.py",
        "modeling_megahybrid.py",
        "attention_megahybrid.py",
        "views_megahybrid.py",
    )
    scheme_fields = SCHEME_FIELDS | {"chunk", "sink", "near", "fuse", "split"}
    model_fields = MODEL_FIELDS | {"embedding_scale", "residual_scale", "logit_softcap"}
    serves = Serves(
        blocks=("pre_norm", "post_norm", "sandwich", "parallel"),
        norms=("rms", "layernorm"),
        qk_norms=(
            QKNorm(kind="none"),
            QKNorm(kind="none", weight="per_head"),
            QKNorm(kind="none", over="projection"),
            QKNorm(kind="none", weight="none"),
            QKNorm(kind="none", over="projection", weight="none"),
            QKNorm(kind="rms"),
            QKNorm(kind="rms", weight="none"),
            QKNorm(kind="rms", over="projection", weight="none"),
            QKNorm(kind="layernorm", weight="none"),
            QKNorm(kind="layernorm", over="projection", weight="none"),
            QKNorm(kind="rms", weight="per_head"),
            QKNorm(kind="rms", over="projection"),
            QKNorm(kind="layernorm"),
            QKNorm(kind="layernorm", weight="per_head"),
            QKNorm(kind="layernorm", over="projection"),
        ),
        positions=(Rope, Nope),
        scalings=(object,),  # any: of a rotation only the frequencies and the factor are written
        score_scales=(
            SqrtDimScale,
            FixedScale,
            Llama4Scale,
            PowerScale,
            LogScale,
            LogFromScale,
            SsmaxScale,
        ),
        gates=("none", "head", "element"),
        biases=("none", "qkv"),
        activations=("silu", "gelu_tanh"),
        logit_scale=True,
        per_layer=True,
    )

    def shape_reasons(self, model: ModelConfig) -> Iterator[str]:
        """Yield nothing: heads of an odd dimension rotate in part."""
        return iter(())

    def layer_reasons(self, schemes: Sequence[AttentionScheme]) -> Iterator[str]:
        """Yield nothing: each layer is described by itself."""
        return iter(())

    def how(self, schemes: Sequence[AttentionScheme]) -> str:
        """Return its two fields, which its own code reads."""
        return "schemes and layer_schemes, with trust_remote_code"

    def own_fields(self, model: ModelConfig, plan: LayerPlan) -> Fields:
        """Return the schemes by name, and the name of each layer's."""
        return {
            "auto_map": {
                "AutoConfig": "configuration_megahybrid.MegahybridConfig",
                "AutoModelForCausalLM": "modeling_megahybrid.MegahybridForCausalLM",
            },
            "block": model.block,
            "norm": model.norm,
            "norm_eps": model.eps,
            "logit_scale": model.logit_scale,
            "schemes": {name: _scheme(s, model.head_dim) for name, s in plan.schemes.items()},
            "layer_schemes": list(plan.names()),
            **_later_fields(model),
        }

    def from_config(self, config: Any) -> ModelConfig:
        """Refuse: the code of a folder is not run, and who trained the model has its checkpoint."""
        raise InteropError(f"model_type={config.model_type} cannot be imported.")

    def shrink(self, config: Any, plan: LayerPlan, small: LayerPlan) -> None:
        """Change window and scale scheme by scheme, after the same comparison."""
        for name, scheme in config.schemes.items():
            same_or_refused("window", scheme["window"], plan.schemes[name].window)
            scheme["window"] = small.schemes[name].window
            if small.schemes[name].chunk is not None:
                same_or_refused("chunk", scheme["chunk"], plan.schemes[name].chunk)
                scheme["chunk"] = small.schemes[name].chunk
            scheme["logit_scale"] = _scale(small.schemes[name].score_scale)
            near, smaller = plan.schemes[name].near, small.schemes[name].near
            if near is not None and smaller is not None:
                same_or_refused("near.window", scheme["near"]["window"], near.window)
                scheme["near"]["window"] = smaller.window
                scheme["near"]["logit_scale"] = _scale(smaller.score_scale)

    def pair_order(self, head_dim: int, rotary_dim: int) -> Order | None:
        """Return None: it keeps our order."""
        return None


def _later_fields(model: ModelConfig) -> Fields:
    """Return the fields of a model that came later, where they are not at their defaults: an export
    without them stays as it was."""
    later: Fields = {
        "activation": model.activation,
        "embedding_scale": model.embedding_scale,
        "residual_scale": model.residual_scale,
        "logit_softcap": model.logit_softcap,
    }
    defaults = {name: ModelConfig.model_fields[name].default for name in later}
    return {name: value for name, value in later.items() if value != defaults[name]}


def _scheme(scheme: AttentionScheme, head_dim: int) -> Fields:
    """Return the fields that the shipped code reads; their names stay when ours change."""
    # What came later is written where it is not at its default, so that an export stays as it was.
    later: Fields = {
        name: value
        for name, value in (("gate", scheme.gate), ("bias", scheme.bias))
        if value != "none"
    }
    later |= {} if scheme.chunk is None else {"chunk": scheme.chunk}
    later |= {"sink": True} if scheme.sink else {}
    if scheme.near is not None:
        later["near"] = {
            "rotation": _rotation(scheme.near.position, head_dim),
            "position": dump(scheme.near.position),
            "window": scheme.near.window,
            "logit_scale": _scale(scheme.near.score_scale),
        }
    if scheme.fuse is not None:
        later["fuse"] = _fuse(scheme.fuse)
    if scheme.split is not None:
        later["split"] = dump(scheme.split)
    return {
        "rotation": _rotation(scheme.position, head_dim),
        "position": first_fields(scheme.position, dump(scheme.position)),
        "window": scheme.window,
        "qk_norm": dump(scheme.qk_norm),
        "logit_scale": _scale(scheme.score_scale),
        **later,
    }


def _fuse(fuse: Fuse) -> Fields:
    match fuse.gate:
        case "fixed" | "head" | "token":
            return {"gate": fuse.gate, "initial": fuse.initial}
        case _:
            assert_never(fuse.gate)


def _scale(scale: ScoreScale) -> Fields:
    fields = dump(scale)
    if fields.get("offset") == 1:  # as it was before there was another
        del fields["offset"]
    return fields


def _rotation(position: Position, head_dim: int) -> Fields | None:
    match position:
        case Nope():
            return None
        case Rope():
            from megahybrid.interop.rotation_bits import frequencies

            return {
                "frequencies": frequencies(position, head_dim).tolist(),
                "attention_factor": position.attention_factor(),
            }
        case _:
            assert_never(position)
