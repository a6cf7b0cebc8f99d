"""Memory of one rank by ZeRO stage: an estimate from formulas, in bytes.

States per parameter, bf16 (N data ranks): weights 2, gradients accumulated in fp32 (4 where they
are whole, 2 / N where they are cut), fp32 master and two moments 12 / N. Activations per token and
layer in bf16: 8 d + 4 dq + 4 dkv + 6 f kept; selective recomputation drops the MLP's product and
the norm outputs, 2 f + 4 d; full keeps the layer's input, 2 d. The tensor degree divides them all.
"""

import math
from dataclasses import dataclass

from megahybrid.config.counting import Shape, parameter_shapes
from megahybrid.config.model import ModelConfig
from megahybrid.config.stages import Stage

# The loss holds fp32 logits of about this many bytes at a time, and their gradient.
LOSS_CHUNK_BYTES = 256 * 2**20
# The vocabulary is padded to a multiple of this and the tensor degree.
VOCABULARY_MULTIPLE = 8


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int  # of one chunk, their gradient, and the fp32 gradient of the head's weight

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def local_parameters(model: ModelConfig, tensor: int) -> int:
    """Parameters that one rank of `tensor` tensor ranks holds, before ZeRO."""
    return sum(
        _local(model, name, shape, tensor) for name, shape in parameter_shapes(model).items()
    )


def _local(model: ModelConfig, name: str, shape: Shape, tensor: int) -> int:
    size = math.prod(shape)
    if name in ("embedding.weight", "head.weight"):
        multiple = VOCABULARY_MULTIPLE * tensor
        return -(-shape[0] // multiple) * multiple // tensor * shape[1]
    kv_is_replicated = model.num_kv_heads % tensor != 0
    if ".attention.key" in name or ".attention.value" in name:
        shared = name.endswith("_norm.weight") and shape == (model.head_dim,)
        return size if kv_is_replicated or shared else size // tensor
    if name.endswith("query_norm.weight"):
        return size if shape == (model.head_dim,) else size // tensor
    return size if name.endswith("norm.weight") else size // tensor


def states_per_parameter(precision: str, zero_stage: int, data_degree: int) -> tuple[float, ...]:
    """Bytes per local parameter of weights, gradients and optimizer."""
    n = data_degree
    if precision == "fp32":
        weights, gradients, optimizer = 4.0, 4.0, 8.0 if zero_stage == 0 else 12.0
    else:
        # Gradients are summed in fp32 where they are whole; ZeRO 2 and 3 keep bf16 slices.
        weights, gradients, optimizer = 2.0, 4.0 if zero_stage <= 1 else 2.0, 12.0
    return (
        weights / n if zero_stage >= 3 else weights,
        gradients / n if zero_stage >= 2 else gradients,
        optimizer / n if zero_stage >= 1 else optimizer,
    )


def activation_bytes_per_token(model: ModelConfig, policy: str, bytes_per_value: int = 2) -> int:
    """Bytes of one layer that are kept for backward, per token, at tensor degree 1."""
    hidden, inner = model.hidden_size, model.intermediate_size
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    kept = {
        "none": 4 * hidden + 2 * queries + 2 * keys + 3 * inner,
        "selective": 2 * hidden + 2 * queries + 2 * keys + 2 * inner,
        "full": hidden,
    }
    return kept[policy] * bytes_per_value


def activations(model: ModelConfig, stage: Stage, tensor: int, precision: str) -> int:
    """Activations of one micro batch on one rank: what all layers keep, and the one layer under
    full recomputation that backward holds whole at a time."""
    width = 4 if precision == "fp32" else 2
    policies = [stage.recompute_of_layer(layer) for layer in range(model.layer_plan.num_layers)]
    per_token = sum(activation_bytes_per_token(model, policy, width) for policy in policies)
    if "full" in policies:
        per_token += activation_bytes_per_token(model, "none", width)
    return per_token * stage.micro_batch_tokens // tensor


def memory_per_rank(
    model: ModelConfig,
    stage: Stage,
    *,
    tensor: int,
    data_degree: int,
    zero_stage: int,
    precision: str,
) -> Memory:
    """What one rank holds at the fullest moment of a step."""
    local = local_parameters(model, tensor)
    weights, gradients, optimizer = states_per_parameter(precision, zero_stage, data_degree)
    local_vocab = -(-model.vocab_size // tensor)
    chunk = min(LOSS_CHUNK_BYTES, 4 * local_vocab * stage.micro_batch_tokens)
    return Memory(
        weights=int(local * weights),
        gradients=int(local * gradients),
        optimizer=int(local * optimizer),
        activations=activations(model, stage, tensor, precision),
        logits=2 * chunk + 4 * local_vocab * model.hidden_size,
    )
