"""Tiny models that together hold every scheme, block, norm and head a config can name."""

from itertools import product
from random import Random
from typing import Any

from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig

ROPE: dict[str, Any] = {"position": {"kind": "rope", "theta": 10000.0}}
NOPE: dict[str, Any] = {"position": {"kind": "nope"}}
WINDOW = 5


def rope(**fields: Any) -> dict[str, Any]:
    """A rotated scheme with more said about the rotation."""
    return {"position": ROPE["position"] | fields}


def qk_norm(kind: str, over: str = "head", weight: str = "shared") -> dict[str, Any]:
    """The part of a scheme that normalises queries and keys."""
    return {"qk_norm": {"kind": kind, "over": over, "weight": weight}}


def score_scale(**fields: Any) -> dict[str, Any]:
    """The part of a scheme that scales scores."""
    return {"score_scale": fields}


def near(window: int | None, **fields: Any) -> dict[str, Any]:
    """The part of a scheme that is a rotated view of near keys."""
    return {"near": ROPE | {"window": window} | fields}


# Each family is a period of layers; two layers tell as much as eight.
FAMILIES: dict[str, list[dict[str, Any]]] = {
    "rope": [ROPE],
    "nope": [NOPE],
    "rnope_swa": [ROPE | {"window": WINDOW}, NOPE],
    "window-one-key": [ROPE | {"window": 1}, NOPE | {"window": 7}],
    "linear-ntk": [
        rope(scaling={"kind": "linear", "factor": 3.0}),
        rope(scaling={"kind": "ntk", "factor": 4.0}),
    ],
    "yarn-llama3": [
        rope(theta=500.0, scaling={"kind": "yarn", "factor": 4.0, "original_length": 64}),
        rope(theta=500.0, scaling={"kind": "llama3", "factor": 8.0, "original_length": 64}),
    ],
    "partial": [rope(rotary_fraction=0.5), rope(rotary_fraction=0.3) | {"window": 3}],
    "rms-shared": [ROPE | qk_norm("rms"), NOPE | qk_norm("rms")],
    "layernorm-per_head": [
        ROPE | qk_norm("layernorm", weight="per_head"),
        NOPE | qk_norm("rms", weight="per_head") | {"window": WINDOW},
    ],
    "projection": [
        ROPE | qk_norm("rms", over="projection"),
        ROPE | qk_norm("layernorm", over="projection"),
    ],
    "layernorm-shared-fixed": [
        ROPE | qk_norm("layernorm") | score_scale(kind="fixed", scale=0.7),
        NOPE,
    ],
    "llama4-log": [
        NOPE | score_scale(kind="llama4", floor=3, coefficient=0.4),
        ROPE | score_scale(kind="log", base=2.5) | {"window": WINDOW},
    ],
    "gate": [
        ROPE | {"gate": "head", "window": WINDOW},
        NOPE | {"gate": "element"} | qk_norm("rms"),
    ],
    "chunk": [
        ROPE | {"chunk": WINDOW} | qk_norm("rms"),
        NOPE | {"chunk": 4} | score_scale(kind="log", base=2.5),
    ],
    "weightless": [
        ROPE | qk_norm("rms", weight="none") | score_scale(kind="power", length=64, exponent=0.2),
        NOPE
        | qk_norm("layernorm", over="projection", weight="none")
        | score_scale(kind="log_from", length=3, coefficient=0.1),
    ],
    "llama4-from-0": [
        NOPE | score_scale(kind="llama4", floor=3, coefficient=0.4, offset=0) | {"window": WINDOW},
        ROPE
        | qk_norm("rms", over="projection", weight="none")
        | score_scale(kind="log_from", length=2, coefficient=0.5)
        | {"chunk": 4},
    ],
    "ssmax": [
        NOPE | score_scale(kind="ssmax"),
        ROPE | score_scale(kind="ssmax") | qk_norm("rms") | {"window": WINDOW},
    ],
    "bias": [
        ROPE | {"bias": "qkv", "window": WINDOW},
        NOPE | {"bias": "qkv"} | qk_norm("rms", over="projection"),
    ],
    "sink": [
        ROPE | {"sink": True, "window": WINDOW},
        NOPE | {"sink": True, "gate": "head"} | qk_norm("rms"),
    ],
    "longrope-multipliers": [
        rope(
            scaling={
                "kind": "longrope",
                "factors": [1.0, 1.5, 3.0, 7.0],
                "factor": 4.0,
                "original_length": 64,
            }
        )
        | qk_norm("rms"),
        rope(rotary_fraction=0.5, spectrum="head", scaling={"kind": "linear", "factor": 2.0})
        | {"window": WINDOW},
    ],
    # By token over a rotated far view with a window, and by head over all keys.
    "fused": [
        rope(theta=500.0)
        | qk_norm("rms")
        | {"window": 9, "fuse": {"gate": "token"}}
        | near(WINDOW, score_scale={"kind": "log", "base": 2.5}),
        NOPE | {"gate": "head", "fuse": {"gate": "head", "initial": 0.3}} | near(WINDOW),
    ],
    "split": [
        NOPE | {"split": {"near": 1, "of": 2}, "bias": "qkv"} | near(WINDOW),
        NOPE | score_scale(kind="ssmax") | {"fuse": {"gate": "fixed", "initial": 0.3}} | near(None),
    ],
}
# Fields of the model that a family has beside its layers.
FIELDS: dict[str, dict[str, Any]] = {
    "longrope-multipliers": {
        "embedding_scale": 5.5,
        "residual_scale": 0.3,
        "logit_softcap": 0.7,
        "activation": "gelu_tanh",
    },
}
BLOCKS = ("pre_norm", "post_norm", "sandwich", "parallel")
NORMS = ("rms", "layernorm")
HEADS = 4


def model(
    family: str,
    block: str = "pre_norm",
    norm: str = "rms",
    *,
    kv_heads: int = 2,
    tied: bool = True,
    vocab_size: int = 50,
    hidden_size: int = 32,
    logit_scale: float = 1.0,
) -> ModelConfig:
    """A model of two layers; its vocabulary divides no degree, so that padding is in play."""
    layers = FAMILIES[family]
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=48,
        num_heads=HEADS,
        num_kv_heads=kv_heads,
        head_dim=8,
        block=block,
        norm=norm,
        tie_embeddings=tied,
        logit_scale=logit_scale,
        **FIELDS.get(family, {}),
        layer_plan=LayerPlan.model_validate(
            {
                "num_layers": 2,
                "pattern": [f"layer{index}" for index in range(len(layers))],
                "schemes": {f"layer{index}": scheme for index, scheme in enumerate(layers)},
            }
        ),
    )


# Blocks that meet both norms in each family, and those that meet one, in turn.
BOTH_NORMS = ("pre_norm", "post_norm", "parallel")
# What each family × block × norm is run with; shuffled within a family, so that each value meets
# each family, and over families each block, each norm and each other value.
TURNS: dict[str, tuple[Any, ...]] = {
    "kv_heads": (1, 1, 2, 2, 2, 4, 4),
    "recompute": ("none", "none", "selective", "selective", "full", "full", "offload"),
    "tied": (True, True, True, True, False, False, False),
    "logit_scale": (1.0, 1.0, 1.0, 0.25, 0.25, 0.25, 0.25),
    "documents": (True, True, True, True, True, False, False),
    "kernel": ("auto", "auto", "auto", "auto", "reference", "reference", "auto"),
}


def every_layer_case() -> dict[str, dict[str, Any]]:
    """Each family × block × norm by name, as arguments of a comparison."""
    draw, cases = Random(2), {}
    for number, family in enumerate(FAMILIES):
        turns = {name: draw.sample(values, len(values)) for name, values in TURNS.items()}
        blocks = [*product(BOTH_NORMS, NORMS), ("sandwich", NORMS[number % 2])]
        for index, (block, norm) in enumerate(blocks):
            chosen = {name: values[index] for name, values in turns.items()}
            of_model = {name: chosen.pop(name) for name in ("kv_heads", "tied", "logit_scale")}
            cases[f"{family}-{block}-{norm}"] = {
                "config": model(family, block, norm, **of_model),
                "seed": len(cases),
                **chosen,
            }
    return cases
