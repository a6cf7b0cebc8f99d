"""The members of the unions that a model is made of, found in the types, and an example of each.

A member that is added to a union and has no example here fails by its name.
"""

import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from megahybrid.config import attention, fusion, layer_plan, model, scaling, score_scale
from megahybrid.config.attention import AttentionScheme
from megahybrid.config.model import ModelConfig
from tests.interop.examples import model_of

Fields = dict[str, Any]
ROPE: Fields = {"position": {"kind": "rope", "theta": 500.0}}
NOPE: Fields = {"position": {"kind": "nope"}}
NEAR: Fields = {"position": ROPE["position"], "window": 5}

UNIONS: dict[str, Any] = {
    "position": attention.Position,
    "scaling": scaling.Scaling,
    "spectrum": attention.Spectrum,
    "score_scale": score_scale.ScoreScale,
    "qk_norm.kind": attention.QKNormKind,
    "qk_norm.over": attention.QKNormOver,
    "qk_norm.weight": attention.QKNormWeight,
    "gate": attention.Gate,
    "bias": attention.Bias,
    "fuse.gate": fusion.FuseGate,
    "block": model.Block,
    "norm": model.NormKind,
    "activation": model.Activation,
    "pattern": layer_plan.Pattern,
}


@dataclass(frozen=True)
class Example:
    """The smallest model with a member: schemes of its layers and fields of the model."""

    schemes: tuple[Fields, ...]
    fields: tuple[tuple[str, Any], ...] = ()
    rule: bool = False  # a pattern by rule

    def model(self) -> ModelConfig:
        """The model, checked as any other."""
        config = model_of(self.schemes, **dict(self.fields))
        if not self.rule:
            return config
        names = list(config.layer_plan.schemes)
        rule = {"default": names[0], "special": names[1], "period": 2, "offset": 1}
        plan = {"num_layers": 2, "pattern": rule, "schemes": config.layer_plan.schemes}
        return ModelConfig.model_validate({**config.__dict__, "layer_plan": plan})


GEMMA: tuple[Fields, ...] = (
    ROPE | {"window": 5, "qk_norm": {"kind": "rms"}},
    {
        "position": {"kind": "rope", "theta": 1e6, "scaling": {"kind": "linear", "factor": 8.0}},
        "qk_norm": {"kind": "rms"},
    },
)
SANDWICH = (("block", "sandwich"),)


def _scaled(**fields: Any) -> Example:
    return Example(({"position": ROPE["position"] | {"scaling": fields}},))


def _part(spectrum: str) -> Example:
    part = {"rotary_fraction": 0.5, "spectrum": spectrum}
    return Example((ROPE | {"window": 5}, {"position": ROPE["position"] | part}))


def _with(**scheme: Any) -> Example:
    return Example((ROPE | scheme | {"window": 5}, NOPE | scheme))


def _fused(gate: str, scale: Fields | None = None) -> Example:
    near = NEAR | ({} if scale is None else {"score_scale": scale})
    fused = {"fuse": {"gate": gate, "initial": 0.3}}
    return Example((ROPE | {"window": 9, "near": near} | fused, NOPE | {"near": NEAR} | fused))


EXAMPLES: dict[str, Example] = {
    "position.rope": Example((ROPE, ROPE | {"window": 5})),
    "position.nope": Example((NOPE, NOPE | {"window": 5})),
    "scaling.linear": _scaled(kind="linear", factor=3.0),
    "scaling.ntk": _scaled(kind="ntk", factor=4.0),
    "scaling.yarn": _scaled(kind="yarn", factor=4.0, original_length=64),
    "scaling.llama3": _scaled(kind="llama3", factor=8.0, original_length=64),
    "scaling.longrope": _scaled(
        kind="longrope", factors=[1.0, 1.5, 3.0, 7.0], factor=4.0, original_length=64
    ),
    "spectrum.rotated": _part("rotated"),
    "spectrum.head": _part("head"),
    "score_scale.sqrt_dim": _with(score_scale={"kind": "sqrt_dim"}),
    "score_scale.fixed": _with(score_scale={"kind": "fixed", "scale": 0.3}),
    "score_scale.llama4": _with(score_scale={"kind": "llama4", "floor": 3, "coefficient": 0.4}),
    "score_scale.power": _with(score_scale={"kind": "power", "length": 3, "exponent": 0.3}),
    "score_scale.log_from": _with(
        score_scale={"kind": "log_from", "length": 3, "coefficient": 0.4}
    ),
    "score_scale.log": _with(score_scale={"kind": "log", "base": 3.0}),
    "score_scale.ssmax": _with(score_scale={"kind": "ssmax"}),
    "qk_norm.kind.none": _with(qk_norm={"kind": "none"}),
    "qk_norm.kind.rms": _with(qk_norm={"kind": "rms"}),
    "qk_norm.kind.layernorm": _with(qk_norm={"kind": "layernorm"}),
    "qk_norm.over.head": _with(qk_norm={"kind": "rms", "over": "head"}),
    "qk_norm.over.projection": _with(qk_norm={"kind": "rms", "over": "projection"}),
    "qk_norm.weight.shared": _with(qk_norm={"kind": "rms", "weight": "shared"}),
    "qk_norm.weight.per_head": _with(qk_norm={"kind": "layernorm", "weight": "per_head"}),
    "qk_norm.weight.none": Example(
        (
            ROPE | {"window": 5, "qk_norm": {"kind": "rms", "weight": "none"}},
            NOPE | {"qk_norm": {"kind": "layernorm", "over": "projection", "weight": "none"}},
        )
    ),
    "gate.none": _with(gate="none"),
    "gate.head": _with(gate="head"),
    "gate.element": _with(gate="element"),
    "bias.none": _with(bias="none"),
    "bias.qkv": _with(bias="qkv"),
    "block.pre_norm": Example((ROPE | {"window": 5}, NOPE), (("block", "pre_norm"),)),
    "block.post_norm": Example((ROPE, NOPE), (("block", "post_norm"),)),
    "block.sandwich": Example((ROPE | {"window": 5}, NOPE), (("block", "sandwich"),)),
    "block.parallel": Example((ROPE, NOPE), (("block", "parallel"),)),
    "norm.rms": Example((ROPE, NOPE), (("norm", "rms"),)),
    "norm.layernorm": Example(
        (ROPE | {"window": 5}, NOPE), (("norm", "layernorm"), ("block", "parallel"))
    ),
    "field.window": _with(),
    "field.near": _fused("token", scale={"kind": "llama4", "floor": 3, "coefficient": 0.4}),
    "field.fuse": _fused("head"),
    "field.split": Example(
        (
            NOPE | {"near": NEAR, "split": {"near": 1, "of": 2}},
            ROPE | {"near": {"position": NOPE["position"]}, "split": {"near": 1, "of": 3}},
        )
    ),
    "fuse.gate.fixed": _fused("fixed"),
    "fuse.gate.head": _fused("head"),
    "fuse.gate.token": _fused("token"),
    "field.chunk": Example((ROPE | {"chunk": 5}, NOPE | {"chunk": 4})),
    "field.sink": _with(sink=True),
    "activation.silu": Example((ROPE, NOPE), (("activation", "silu"),)),
    "activation.gelu_tanh": Example((ROPE, NOPE), (("activation", "gelu_tanh"),)),
    # Gemma 3's layers, whose class carries some of these.
    "model.logit_scale": Example((ROPE, NOPE), (("logit_scale", 0.5),)),
    "model.embedding_scale": Example(GEMMA, (*SANDWICH, ("embedding_scale", 32**0.5))),
    "model.residual_scale": Example((ROPE, NOPE), (("residual_scale", 0.3),)),
    "model.logit_softcap": Example(
        GEMMA,
        (
            *SANDWICH,
            ("embedding_scale", 32**0.5),
            ("logit_softcap", 0.5),
            ("activation", "gelu_tanh"),
        ),
    ),
    "pattern.list": Example((ROPE, NOPE)),
    "pattern.periodic": Example((ROPE, NOPE), rule=True),
}


def members(union: Any) -> list[str]:
    """The names of a union's members: values of `kind`, literals, or classes by their name."""
    origin = get_origin(union)
    if origin is Annotated:
        return members(get_args(union)[0])
    if origin in (Union, types.UnionType):
        return [name for member in get_args(union) for name in members(member)]
    if origin is Literal:
        return list(get_args(union))
    if origin is list:
        return ["list"]
    kind = union.model_fields.get("kind")
    return list(get_args(kind.annotation)) if kind else [union.__name__.lower()]


MEMBERS = [f"{name}.{member}" for name, union in UNIONS.items() for member in members(union)]
# What a scheme says by a number, not by a member of a union.
MEMBERS += [
    f"field.{name}"
    for name in AttentionScheme.model_fields
    if name not in ("position", "qk_norm") and name not in UNIONS
]
# The numbers of the function that a model says beside its layers.
MEMBERS += [
    f"model.{name}"
    for name, field in ModelConfig.model_fields.items()
    if field.annotation in (float, float | None)
    and name not in ("eps", "initial_std", "embedding_std")
]


def schemes_of(config: ModelConfig) -> tuple[AttentionScheme, ...]:
    """One scheme per layer."""
    return config.layer_plan.expand()
