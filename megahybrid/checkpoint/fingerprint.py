"""`model_fingerprint`: whether two configs describe the same parameters, used in the same network.

What a stage may change (theta, scaling, window, the formula of a position or of a logit scale) is
left out; what decides which parameters exist, and the facts about the network that no stage can
change, are in. The sizes stand in clear, so that a message that shows two of them explains itself.
"""

import hashlib
import json

from megahybrid.config.model import ModelConfig

# Listed, not "all fields": a field added later must not disown the checkpoints there are.
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


def model_fingerprint(model: ModelConfig) -> str:
    """For example `8x128-4q2kv32-4096-pre_norm-rms-5f0c9a51e3b7`.

    That is layers × hidden size, query heads, key heads and their dimension, vocabulary, block,
    norm, and a digest of these and the rest.
    """
    layers = [scheme.learned() for scheme in model.layer_plan.expand()]
    facts = {name: getattr(model, name) for name in FACTS}
    text = json.dumps({**facts, "layers": layers}, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    heads = f"{model.num_heads}q{model.num_kv_heads}kv{model.head_dim}"
    return (
        f"{len(layers)}x{model.hidden_size}-{heads}-{model.vocab_size}-"
        f"{model.block}-{model.norm}-{digest}"
    )
