"""The recompute policy of each layer that fits a budget of memory at the fewest extra FLOPs."""

from megahybrid.config.counting import layer_flops_per_token, parameters
from megahybrid.config.memory import LOSS_CHUNK_BYTES, activation_bytes_per_token
from megahybrid.config.model import ModelConfig

# bf16 weights and gradients, fp32 masters and two moments, and the gradients in fp32 at the update.
STATE_BYTES = 2 + 2 + 12 + 4


def expected_bytes(config: ModelConfig, policies: list[str], tokens: int) -> int:
    """States, kept activations, the one layer that full recomputation holds whole, the loss."""
    kept = sum(activation_bytes_per_token(config, policy) for policy in policies)
    if "full" in policies:
        kept += activation_bytes_per_token(config, "none")
    head = 4 * config.vocab_size * config.hidden_size + 2 * LOSS_CHUNK_BYTES
    return STATE_BYTES * parameters(config) + kept * tokens + head


def solve(config: ModelConfig, tokens: int, budget_bytes: float, length: int) -> list[str]:
    """Nothing recomputed if it fits; else selective everywhere (no product is repeated), else full
    as well on as few layers as it takes, those with the fewest FLOPs first."""
    schemes = config.layer_plan.expand()
    for policy in ("none", "selective"):
        policies = [policy] * len(schemes)
        if expected_bytes(config, policies, tokens) <= budget_bytes:
            return policies
    costs = [layer_flops_per_token(config, scheme, length) for scheme in schemes]
    for layer in sorted(range(len(schemes)), key=lambda index: costs[index]):
        policies[layer] = "full"
        if expected_bytes(config, policies, tokens) <= budget_bytes:
            break
    return policies
