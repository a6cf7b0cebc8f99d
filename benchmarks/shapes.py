"""The shapes that are measured, as the paper group builds them: parallel LayerNorm block, tied
embeddings, three windowed rotated layers to one full layer without position."""

from typing import Any

import torch
from torch import Tensor

from megahybrid.config.attention import AttentionScheme, Nope, Rope
from megahybrid.config.counting import full_attention
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig

SHAPES: dict[str, dict[str, Any]] = {
    # For tests of the scripts themselves.
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_heads": 4,
        "num_kv_heads": 2,
        "layers": 4,
        "window": 32,
    },
    # 1.3 M parameters, for lengths up to 32k on one core: one period of layers.
    "growth": {
        "vocab_size": 4096,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_heads": 2,
        "num_kv_heads": 1,
        "layers": 4,
        "window": 512,
    },
    # 25.2 M parameters.
    "25m": {
        "vocab_size": 20480,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_heads": 6,
        "num_kv_heads": 2,
        "layers": 8,
        "window": 512,
    },
    # 1.24 B parameters: configs/models/rnope_swa_1b.yaml.
    "1b": {
        "vocab_size": 131072,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_heads": 16,
        "num_kv_heads": 4,
        "layers": 16,
        "window": 4096,
    },
    # 8.03 B parameters: configs/models/rnope_swa_8b.yaml.
    "8b": {
        "vocab_size": 256000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_heads": 32,
        "num_kv_heads": 8,
        "layers": 32,
        "window": 4096,
    },
}


def hybrid(shape: str, window: int | None = None) -> ModelConfig:
    """The RNoPE-SWA model of this shape, with its own window or another."""
    fields = dict(SHAPES[shape])
    layers, own_window = fields.pop("layers"), fields.pop("window")
    plan = LayerPlan(
        num_layers=layers,
        pattern=["local", "local", "local", "global"],
        schemes={
            "local": AttentionScheme(
                position=Rope(kind="rope", theta=10000.0), window=window or own_window
            ),
            "global": AttentionScheme(position=Nope(kind="nope")),
        },
    )
    return ModelConfig(**fields, block="parallel", norm="layernorm", layer_plan=plan)


def full(shape: str) -> ModelConfig:
    """The same parameters with every window removed."""
    config = hybrid(shape)
    return config.model_copy(update={"layer_plan": full_attention(config.layer_plan)})


def random_batch(
    config: ModelConfig, rows: int, length: int, device: torch.device, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """Uniform tokens [rows, length] and their targets; the last target of a row does not count."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (rows, length), generator=generator)
    targets = torch.full_like(tokens, -100)
    targets[:, :-1] = tokens[:, 1:]
    return tokens.to(device), targets.to(device)
