"""`model_fingerprint`: whether two configs describe the same parameters, used in the same network.

What a stage may change (theta, scaling, window, the formula of a position or of a score scale) is
left out; what decides which parameters exist, and the facts about the network that no stage can
change, are in. The sizes stand in clear, so that a message that shows two of them explains itself.

Checkpoints hold fingerprints, so what they are made of is a format: the keys below are written as
version 0.1.0 wrote them, whatever the fields and messages are called today.
"""

import hashlib
import json
from collections.abc import Collection
from typing import Any

from megahybrid.config.attention import AttentionScheme
from megahybrid.config.base import Frozen
from megahybrid.config.model import ModelConfig

# Listed, not "all fields": these are written whatever they are, as 0.1.0 did.
FACTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "block",
    "norm",
    "eps",
    "tie_embeddings",
    "logit_scale",
)
# What makes no other model: the plan counts by its layers, and the others fill only the beginning.
NO_FACTS = ("layer_plan", "initial_std", "embedding_std")
# Of a scheme: what a stage may change, and what `_layer` writes in 0.1.0's words.
STAGES_CHANGE = ("position", "window", "chunk", "score_scale", "near", "split")
WRITTEN = ("qk_norm", "fuse")
QK_NORM = ("kind", "over", "weight")


def model_fingerprint(model: ModelConfig) -> str:
    """For example `8x128-4q2kv32-4096-pre_norm-rms-5f0c9a51e3b7`.

    That is layers × hidden size, query heads, key heads and their dimension, vocabulary, block,
    norm, and a digest of these and the rest.
    """
    layers = [_layer(scheme) for scheme in model.layer_plan.expand()]
    facts = {name: getattr(model, name) for name in FACTS} | _later(model, (*FACTS, *NO_FACTS))
    text = json.dumps({**facts, "layers": layers}, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    heads = f"{model.num_heads}q{model.num_kv_heads}kv{model.head_dim}"
    return (
        f"{len(layers)}x{model.hidden_size}-{heads}-{model.vocab_size}-"
        f"{model.block}-{model.norm}-{digest}"
    )


def _layer(scheme: AttentionScheme) -> str:
    """The key of one layer: its learned parameters as 0.1.0 wrote them, then the fields that came
    later, as JSON, where they differ from their defaults."""
    learned, keys = scheme.learned(), []
    if learned.qk_norm is not None:
        over, weight = learned.qk_norm
        keys.append(f"qk_norm over {over}, weight {weight}")
        keys += _texts(_later(scheme.qk_norm, QK_NORM), "qk_norm.")
    if learned.score_scale is not None:
        keys.append(f"{learned.score_scale} scale")
    if learned.fuse is not None:  # without its first value
        keys.append(f"fuse per {learned.fuse}")
    keys += _texts(_later(scheme, (*STAGES_CHANGE, *WRITTEN)))
    return " and ".join(keys) or "none"


def _texts(fields: dict[str, Any], prefix: str = "") -> list[str]:
    return [
        f"{prefix}{name}={json.dumps(item, sort_keys=True)}"
        for name, item in sorted(fields.items())
    ]


def _later(value: Frozen, known: Collection[str]) -> dict[str, Any]:
    """The fields beside `known` that differ from their defaults: one that is added later disowns
    no checkpoint there is."""
    changed = value.model_dump(mode="json", exclude_defaults=True)
    return {name: item for name, item in changed.items() if name not in known}
