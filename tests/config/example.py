"""A small run as plain values, and ways to change it."""

import copy
from typing import Any

from megahybrid.config import RunConfig, parse
from megahybrid.config.yaml_file import apply_overrides

EXAMPLE: dict[str, Any] = {
    "model": {
        "vocab_size": 4096,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_heads": 8,
        "num_kv_heads": 2,
        "layer_plan": {
            "num_layers": 8,
            "pattern": ["local", "local", "local", "global"],
            "schemes": {
                "local": {"position": {"kind": "rope", "theta": 10000}, "window": 64},
                "global": {"position": {"kind": "nope"}},
            },
        },
    },
    "parallel": {"tensor": 2},
    "data": {"sources": {"stdlib": {"path": "x"}}, "block_tokens": 65536},
    "precision": "fp32",
    "stages": [
        {
            "name": "short",
            "tokens": 800_000,
            "lengths": {256: 1},
            "batch_tokens": 8192,
            "micro_batch_tokens": 4096,
            "weights": {"stdlib": 1},
            "learning_rate": {
                "kind": "linear",
                "start": 3e-3,
                "end": 1e-3,
                "warmup_tokens": 50_000,
            },
        },
        {
            "name": "long",
            "tokens": 100_000,
            "lengths": {1024: 3, 4096: 1},
            "batch_tokens": 8192,
            "micro_batch_tokens": 4096,
            "weights": {"stdlib": 1},
            "learning_rate": {"kind": "linear", "start": 1e-3, "end": 1e-4},
        },
    ],
}


def example(*overrides: str) -> RunConfig:
    """The example run with some fields changed as on the command line."""
    return parse(RunConfig, apply_overrides(copy.deepcopy(EXAMPLE), overrides))
