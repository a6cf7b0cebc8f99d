"""A Hugging Face config in our words: the ModelConfig that computes what the class computes.

Read through transformers' own config classes, so that their defaults and old spellings are theirs
to resolve. A field that we cannot say is refused by name, never dropped.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from megahybrid.config.attention import LayerPlan, Rope
from megahybrid.config.base import dump, parse
from megahybrid.config.model import ModelConfig
from megahybrid.errors import InteropError
from megahybrid.interop.said import ENDLESS, MODEL_TYPES, SLIDING

Plain = dict[str, Any]
Scheme = tuple[Plain, int | None]  # position and window
ARCHITECTURES = {kind: name for name, kind in MODEL_TYPES.items() if kind != "megahybrid"}
NOPE: Plain = {"kind": "nope"}
# What must have this value, where the config has the field at all.
PLAIN_FIELDS = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
}


def hear(config: Any) -> tuple[str, ModelConfig]:
    """The class's short name, and the model. Raises InteropError for what we cannot say."""
    name = ARCHITECTURES.get(config.model_type)
    if name is None:
        raise InteropError(
            f"model_type={config.model_type} is none that can be imported "
            f"({', '.join(sorted(ARCHITECTURES))})."
        )
    for field, value in PLAIN_FIELDS.items():
        found = getattr(config, field, value)
        if found != value:
            raise InteropError(
                f"config.json: {field}={found} has no word in our model (only {value})."
            )
    if getattr(config, "quantization_config", None) is not None:
        raise InteropError("config.json: its weights are quantized. Ask for unquantized ones.")
    heads = config.num_attention_heads
    head_dim = head_dim_of(config)
    layers = _LAYERS[name](config)
    model: Plain = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_heads": heads,
        "num_kv_heads": config.num_key_value_heads or heads,
        "head_dim": head_dim,
        "block": _BLOCKS.get(name, "pre_norm"),
        "norm": "layernorm" if name in ("Cohere", "Cohere2") else "rms",
        "eps": float(_eps(config)),
        "tie_embeddings": bool(config.tie_word_embeddings),
        "initial_std": float(config.initializer_range) or 0.02,
        "layer_plan": _plan(layers, _norm(name, config), _scale(name, config, head_dim)),
    }
    if name in ("Cohere", "Cohere2"):
        model["logit_scale"] = float(config.logit_scale)
    if name == "GraniteSWA":
        model["logit_scale"] = 1.0 / config.logits_scaling
    return name, parse(ModelConfig, model, where="model")


def head_dim_of(config: Any) -> int:
    """Dimensions of a head, which some configs leave to be worked out."""
    named = getattr(config, "head_dim", None)
    return named or config.hidden_size // config.num_attention_heads


_BLOCKS = {
    "Cohere": "parallel",
    "Cohere2": "parallel",
    "Exaone4": "post_norm",
    "Olmo3": "post_norm",
}


def _eps(config: Any) -> float:
    return config.layer_norm_eps if hasattr(config, "layer_norm_eps") else config.rms_norm_eps


def _norm(name: str, config: Any) -> Plain:
    if name in ("Qwen3", "Exaone4"):
        return {"kind": "rms"}
    if name == "Olmo3":
        return {"kind": "rms", "over": "projection"}
    if name == "Cohere" and config.use_qk_norm:
        return {"kind": "layernorm", "weight": "per_head"}
    return {"kind": "none"}


def _scale(name: str, config: Any, head_dim: int) -> Plain:
    if name == "GraniteSWA" and config.attention_multiplier != head_dim**-0.5:
        return {"kind": "fixed", "scale": float(config.attention_multiplier)}
    return {"kind": "sqrt_dim"}


def rope_position(parameters: Plain, config: Any) -> Plain:
    """Our position of one rope_parameters entry."""
    kind = parameters.get("rope_type", "default")
    theta = float(parameters["rope_theta"])
    part = parameters.get("partial_rotary_factor")
    if kind == "proportional":
        return _proportional(parameters, theta, head_dim_of(config))
    position: Plain = {"kind": "rope", "theta": theta}
    if kind == "default":
        return position  # it ignores a partial_rotary_factor
    if part not in (None, 1.0):
        raise InteropError(f"rope_type={kind} with partial_rotary_factor={part} cannot be run.")
    if kind == "linear":
        scaling: Plain = {"kind": "linear", "factor": float(parameters["factor"])}
    elif kind == "llama3":
        scaling = {
            "kind": "llama3",
            "factor": float(parameters["factor"]),
            "low_frequency_factor": float(parameters["low_freq_factor"]),
            "high_frequency_factor": float(parameters["high_freq_factor"]),
            "original_length": int(parameters["original_max_position_embeddings"]),
        }
    elif kind == "yarn":
        scaling = _yarn(parameters, config)
    else:
        raise InteropError(
            f"rope_type={kind} has no word in our model (default, linear, yarn, llama3)."
        )
    return position | {"scaling": scaling}


def _proportional(parameters: Plain, theta: float, head_dim: int) -> Plain:
    """A rotation of part of a head. The class reaches its frequencies by the theta that a whole
    head would have; ours is the one near its root that gives the same fp32 bits, if there is one.
    """
    part = float(parameters.get("partial_rotary_factor", 1.0))
    pairs = int(part * head_dim // 2)
    if pairs == 0:
        return NOPE
    theirs = 1.0 / theta ** (torch.arange(0, 2 * pairs, 2, dtype=torch.float) / head_dim)
    root = theta ** (2 * pairs / head_dim)
    beside = [root]
    for away in (math.inf, 0.0):
        near = np.float32(root)
        for _ in range(4):
            near = np.nextafter(near, np.float32(away))
            beside.append(float(near))
    fraction = 1.0 if 2 * pairs == head_dim else (2 * pairs + 0.5) / head_dim
    for found in (float(f"{root:.9g}"), *beside):
        position = Rope(kind="rope", theta=found, rotary_fraction=fraction)
        if torch.equal(position.frequencies(head_dim, torch, torch.float32), theirs):
            if parameters.get("factor", 1.0) == 1.0:
                return dump(position)
            break
    raise InteropError(
        f"rope_type=proportional with rope_theta={theta:g}, partial_rotary_factor={part:g} and "
        f"factor={parameters.get('factor', 1.0)} has frequencies that no theta of ours gives to "
        "the same fp32 bits."
    )


def _yarn(parameters: Plain, config: Any) -> Plain:
    original = int(parameters["original_max_position_embeddings"])
    factor = float(parameters.get("factor") or config.max_position_embeddings / original)
    attention = parameters.get("attention_factor")
    up, down = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if attention is None and up and down and factor > 1:
        # Only together do they mean anything.
        attention = (0.1 * up * math.log(factor) + 1) / (0.1 * down * math.log(factor) + 1)
    truncate = getattr(config, "truncate", parameters.get("truncate", True))
    if config.model_type == "olmo3":
        truncate = getattr(config, "truncate", True)  # it ignores the one in a kind's own entry
    return {
        "kind": "yarn",
        "factor": factor,
        "original_length": original,
        "beta_fast": float(parameters.get("beta_fast") or 32),
        "beta_slow": float(parameters.get("beta_slow") or 1),
        "attention_factor": None if attention is None else float(attention),
        "truncate": bool(truncate),
    }


def _window(config: Any) -> int | None:
    window = config.sliding_window
    if window is not None and window < 2:
        raise InteropError(
            f"config.json: sliding_window={window}: transformers' own cache is wrong for windows "
            "below 2 keys."
        )
    return None if window is None or window >= ENDLESS else int(window)


def _everywhere(config: Any) -> list[Scheme]:
    return [(rope_position(config.rope_parameters, config), None)] * config.num_hidden_layers


def _cohere2(config: Any) -> list[Scheme]:
    rope = rope_position(config.rope_parameters, config)
    window = _window(config)
    return [(rope, window) if t == SLIDING else (NOPE, None) for t in config.layer_types]


def _exaone4(config: Any) -> list[Scheme]:
    """Full layers rotate where no window is given, and only there."""
    if config.sliding_window is None:
        return _everywhere(config)
    return _cohere2(config)


def _smollm3(config: Any) -> list[Scheme]:
    """Windows without use_sliding_window hold on some devices only: refused."""
    rope = rope_position(config.rope_parameters, config)
    if SLIDING in config.layer_types and not config.use_sliding_window:
        raise InteropError(
            "config.json: layer_types has sliding_attention, but use_sliding_window is false: "
            "attention then depends on the kernel. Set use_sliding_window to what is meant."
        )
    window = _window(config)
    return [
        (rope if uses else NOPE, window if kind == SLIDING else None)
        for uses, kind in zip(config.no_rope_layers, config.layer_types, strict=False)
    ]


def _qwen3(config: Any) -> list[Scheme]:
    rope = rope_position(config.rope_parameters, config)
    window = _window(config)
    return [(rope, window if kind == SLIDING else None) for kind in config.layer_types]


def _olmo3(config: Any) -> list[Scheme]:
    window = _window(config)
    return [
        (
            rope_position(config.rope_parameters[kind], config),
            window if kind == SLIDING else None,
        )
        for kind in config.layer_types
    ]


def _granite_swa(config: Any) -> list[Scheme]:
    kind = config.rope_parameters.get("rope_type", "default")
    if kind != "default":
        raise InteropError(f"rope_type={kind} with a theta per layer has no word in our model.")
    window = _window(config)
    return [
        (
            {"kind": "rope", "theta": float(theta)} if theta else NOPE,
            window if kind == SLIDING else None,
        )
        for theta, kind in zip(config.layer_rope_theta, config.layer_types, strict=True)
    ]


_LAYERS: dict[str, Callable[[Any], list[Scheme]]] = {
    "Llama": _everywhere,
    "Cohere": _everywhere,
    "Cohere2": _cohere2,
    "Exaone4": _exaone4,
    "SmolLM3": _smollm3,
    "Qwen3": _qwen3,
    "Olmo3": _olmo3,
    "GraniteSWA": _granite_swa,
}


def _plan(layers: Sequence[Scheme], qk_norm: Plain, score_scale: Plain) -> Plain:
    """A layer plan with a name for every different layer, its pattern as short as it tiles."""
    schemes: dict[str, Plain] = {}
    names = []
    for position, window in layers:
        scheme = {
            "position": position,
            "window": window,
            "qk_norm": qk_norm,
            "score_scale": score_scale,
        }
        name = next((known for known, held in schemes.items() if held == scheme), None)
        if name is None:
            name = _name(position, window, schemes)
            schemes[name] = scheme
        names.append(name)
    period = next(
        size
        for size in range(1, len(names) + 1)
        if len(names) % size == 0 and names == names[:size] * (len(names) // size)
    )
    plan = {"num_layers": len(names), "pattern": names[:period], "schemes": schemes}
    return dump(parse(LayerPlan, plan, where="model.layer_plan"))


def _name(position: Plain, window: int | None, taken: dict[str, Plain]) -> str:
    plain = position["kind"] + ("_window" if window is not None else "")
    name, number = plain, 2
    while name in taken:
        name, number = f"{plain}_{number}", number + 1
    return name
