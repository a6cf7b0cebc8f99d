"""The recompute policy of each layer for a micro batch and a card: the run's own solver."""

from typing import Any

from megahybrid.config.memory_estimate import memory_per_rank, policies_within
from megahybrid.config.model import ModelConfig
from megahybrid.config.parsing import parse
from megahybrid.config.stages import Stage

ONE_CARD: dict[str, Any] = {
    "tensor": 1,
    "data_degree": 1,
    "zero_stage": 1,
    "precision": "bf16",
    "device": "cuda",
}


def _stage(tokens: int, length: int) -> Stage:
    return parse(
        Stage,
        {
            "name": "benchmark",
            "tokens": tokens,
            "lengths": {length: 1},
            "batch_tokens": tokens,
            "micro_batch_tokens": tokens,
            "weights": {"none": 1},
            "learning_rate": {"kind": "linear", "start": 1e-4, "end": 1e-4},
        },
    )


def expected_bytes(
    config: ModelConfig, policies: list[str], tokens: int, offload: str = "none"
) -> int:
    """What a step takes by the formulas, states included."""
    stage, where = _stage(tokens, tokens), ONE_CARD | {"offload": offload}
    return memory_per_rank(config, stage, policies=policies, **where).total


def solve(
    config: ModelConfig, tokens: int, budget_bytes: float, length: int, offload: str = "none"
) -> list[str]:
    """The policies that fit at the fewest extra FLOPs."""
    stage, where = _stage(tokens, length), ONE_CARD | {"offload": offload}
    return policies_within(config, stage, config.layer_plan, int(budget_bytes), **where)
