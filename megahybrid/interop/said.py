"""A model in the words of one Hugging Face class: the fields of its config.json.

Every field that has a default is written: defaults differ between classes, and several fields are
silently ignored where another is missing. What a class cannot say, `huggingface_fit` refuses.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megahybrid.config.attention import AttentionScheme, FixedScale, LayerPlan, Nope, Rope
from megahybrid.config.base import dump
from megahybrid.config.model import ModelConfig
from megahybrid.config.old_words import first_words
from megahybrid.config.scaling import (
    LinearScaling,
    Llama3Scaling,
    NtkScaling,
    YarnScaling,
)
from megahybrid.interop.names import OWN

Fields = dict[str, Any]
# For classes that rotate windowed layers only: a window that no sequence fills. A multiple of 2, so
# that it stays exact wherever it becomes a float.
ENDLESS = 2**30
SLIDING, FULL = "sliding_attention", "full_attention"
MODEL_TYPES = {
    "Cohere2": "cohere2",
    "Cohere": "cohere",
    "SmolLM3": "smollm3",
    "Llama": "llama",
    "Qwen3": "qwen3",
    "GraniteSWA": "granite_swa",
    "Exaone4": "exaone4",
    "Olmo3": "olmo3",
    OWN: "megahybrid",
}


def config_fields(
    architecture: str, model: ModelConfig, plan: LayerPlan, max_length: int
) -> Fields:
    """config.json of the model, but for token ids, dtype and version."""
    schemes = plan.expand()
    fields: Fields = {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": MODEL_TYPES[architecture],
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": len(schemes),
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": max_length,
        "initializer_range": model.initial_std,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
    }
    if architecture == OWN:
        return fields | _own(model, plan)
    fields |= {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0}
    fields["layer_norm_eps" if model.norm == "layernorm" else "rms_norm_eps"] = model.eps
    return fields | _SAY[architecture](model, schemes)


def rope_parameters(position: Rope | Nope, head_dim: int) -> Fields:
    """What 5.x of transformers calls a rotation; none is a proportional one of no part."""
    if isinstance(position, Nope):
        return {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 0.0}
    theta, scaling = position.theta, position.scaling
    if position.rotary_fraction < 1:
        rotary_dim = position.rotary_dim(head_dim)
        return {
            "rope_type": "proportional",
            "rope_theta": theta ** (head_dim / rotary_dim),
            # The class rounds down, and 6 / 10 * 10 need not reach 6.
            "partial_rotary_factor": (rotary_dim + 0.5) / head_dim,
        }
    if isinstance(scaling, NtkScaling):
        return {"rope_type": "default", "rope_theta": scaling.scaled_theta(theta, head_dim)}
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "rope_theta": theta, "factor": scaling.factor}
    if isinstance(scaling, YarnScaling):
        return {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_length,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "attention_factor": scaling.attention_factor_value(),
            "truncate": scaling.truncate,
        }
    if isinstance(scaling, Llama3Scaling):
        return {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    return {"rope_type": "default", "rope_theta": theta}


def inexact_rotations(plan: LayerPlan, head_dim: int) -> list[str]:
    """Reasons against every named class: partial rotations whose frequencies it rounds otherwise.

    `proportional` reaches them by another theta, which is exact in real numbers only.
    """
    reasons = []
    for name, scheme in plan.schemes.items():
        position = scheme.position
        if isinstance(position, Rope) and position.rotary_fraction < 1 and not position.scaling:
            ours = position.frequencies(head_dim, torch, torch.float32)
            said = rope_parameters(position, head_dim)
            powers = torch.arange(0, 2 * len(ours), 2, dtype=torch.float) / head_dim
            if not torch.equal(ours, 1.0 / (said["rope_theta"] ** powers)):
                reasons.append(f"the frequencies of its partial rotations are not {name}'s bits")
    return reasons


def _rotation(schemes: Sequence[AttentionScheme]) -> Rope | Nope:
    """The one rotation of the layers that rotate, or none."""
    rotations = [s.position for s in schemes if isinstance(s.position, Rope)]
    return rotations[0] if rotations else schemes[0].position


def _window(schemes: Sequence[AttentionScheme]) -> int | None:
    return next((s.window for s in schemes if s.window is not None), None)


def _types(sliding: Sequence[bool]) -> list[str]:
    return [SLIDING if item else FULL for item in sliding]


def _plain(rope: Rope | Nope, head_dim: int) -> Fields:
    """A rotation for a class that has a switch of its own for layers without."""
    if isinstance(rope, Nope):
        return {"rope_type": "default", "rope_theta": 10000.0}
    return rope_parameters(rope, head_dim)


def _cohere2(model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
    rotated = [isinstance(s.position, Rope) for s in schemes]
    return {
        "logit_scale": model.logit_scale,
        "layer_types": _types(rotated),
        "sliding_window": _window(schemes) or ENDLESS,
        "rope_parameters": _plain(_rotation(schemes), model.head_dim),
    }


def _cohere(model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
    return {
        "logit_scale": model.logit_scale,
        "use_qk_norm": schemes[0].qk_norm.kind != "none",
        "rope_parameters": rope_parameters(_rotation(schemes), model.head_dim),
    }


def _smollm3(model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
    window = _window(schemes)
    return {
        "mlp_bias": False,
        "layer_types": _types([s.window is not None for s in schemes]),
        "no_rope_layers": [int(isinstance(s.position, Rope)) for s in schemes],
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "rope_parameters": _plain(_rotation(schemes), model.head_dim),
    }


def _llama(model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
    return {
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rope_parameters": rope_parameters(_rotation(schemes), model.head_dim),
    }


def _qwen3(model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
    window = _window(schemes)
    return {
        "layer_types": _types([s.window is not None for s in schemes]),
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "max_window_layers": len(schemes),
        "rope_parameters": rope_parameters(_rotation(schemes), model.head_dim),
    }


def _exaone4(model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
    rotated = [isinstance(s.position, Rope) for s in schemes]
    window = _window(schemes)
    if all(rotated) and window is None:
        return {
            "layer_types": _types([False] * len(schemes)),
            "sliding_window": None,
            "rope_parameters": _plain(_rotation(schemes), model.head_dim),
        }
    return {
        "layer_types": _types(rotated),
        "sliding_window": window or ENDLESS,
        "rope_parameters": _plain(_rotation(schemes), model.head_dim),
    }


def _olmo3(model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
    window = _window(schemes)
    if window is None:
        sliding = [s.position != schemes[0].position for s in schemes]
    else:
        sliding = [s.window is not None for s in schemes]
    positions = {
        kind: [s.position for s, item in zip(schemes, sliding, strict=True) if item == which]
        for kind, which in ((SLIDING, True), (FULL, False))
    }
    return {
        "layer_types": _types(sliding),
        "sliding_window": window or ENDLESS,
        "rope_parameters": {
            # A kind that no layer has must say something all the same.
            kind: rope_parameters((held or [schemes[0].position])[0], model.head_dim)
            for kind, held in positions.items()
        },
    }


def _granite_swa(model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
    scale = schemes[0].score_scale
    ropes = [
        rope_parameters(s.position, model.head_dim)["rope_theta"]
        if isinstance(s.position, Rope)
        else 0
        for s in schemes
    ]
    return {
        "mlp_bias": False,
        "layer_types": _types([s.window is not None for s in schemes]),
        # It makes the mask of a window for any input, whether a layer uses it or not.
        "sliding_window": _window(schemes) or ENDLESS,
        "layer_rope_theta": ropes,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": next((theta for theta in ropes if theta), 10000.0),
        },
        "attention_multiplier": (
            scale.scale if isinstance(scale, FixedScale) else model.head_dim**-0.5
        ),
        "logits_scaling": 1.0 / model.logit_scale,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
    }


_SAY: dict[str, Callable[[ModelConfig, Sequence[AttentionScheme]], Fields]] = {
    "Cohere2": _cohere2,
    "Cohere": _cohere,
    "SmolLM3": _smollm3,
    "Llama": _llama,
    "Qwen3": _qwen3,
    "GraniteSWA": _granite_swa,
    "Exaone4": _exaone4,
    "Olmo3": _olmo3,
}


def _own(model: ModelConfig, plan: LayerPlan) -> Fields:
    """Our own class: a rotation is its fp32 frequencies, which JSON keeps to the bit."""
    schemes = {}
    for name, scheme in plan.schemes.items():
        rotation = None
        if isinstance(scheme.position, Rope):
            frequencies = scheme.position.frequencies(model.head_dim, torch, torch.float32)
            rotation = {
                "frequencies": frequencies.tolist(),
                "attention_factor": scheme.position.attention_factor(),
            }
        schemes[name] = {"rotation": rotation} | dump(scheme)
    return {
        "auto_map": {
            "AutoConfig": "configuration_megahybrid.MegahybridConfig",
            "AutoModelForCausalLM": "modeling_megahybrid.MegahybridForCausalLM",
        },
        "block": model.block,
        "norm": model.norm,
        "norm_eps": model.eps,
        "logit_scale": model.logit_scale,
        # The code that is written beside it reads every export there is, in their words.
        "schemes": first_words({"schemes": schemes})["schemes"],
        "layer_schemes": list(plan.names()),
    }
