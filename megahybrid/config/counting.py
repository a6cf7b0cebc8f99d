"""Exact counts from the config alone: parameters, attended pairs, training FLOPs, KV cache.

A multiply and an add are two FLOPs. Training is three forwards (forward, and backward to inputs
and to weights); matrix products only; the embedding lookup costs nothing and the head counts.
"""

import math
from collections.abc import Iterable

from megahybrid.config.attention import AttentionScheme, LayerPlan, SsmaxScale
from megahybrid.config.model import ModelConfig

Shape = tuple[int, ...]


def parameter_shapes(model: ModelConfig) -> dict[str, Shape]:
    """The global shape of every parameter by canonical name; tied weights once, vocabulary
    unpadded."""
    embedding = (model.vocab_size, model.hidden_size)
    shapes: dict[str, Shape] = {"embedding.weight": embedding}
    for index, scheme in enumerate(model.layer_plan.expand()):
        for name, shape in layer_shapes(model, scheme).items():
            shapes[f"blocks.{index}.{name}"] = shape
    shapes["final_norm.weight"] = (model.hidden_size,)
    if not model.tie_embeddings:
        shapes["head.weight"] = embedding
    return shapes


def layer_shapes(model: ModelConfig, scheme: AttentionScheme) -> dict[str, Shape]:
    """The global shape of every parameter of one layer, by its name within the block."""
    hidden, inner = model.hidden_size, model.intermediate_size
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    shapes: dict[str, Shape] = {
        "attention.query.weight": (queries, hidden),
        "attention.key.weight": (keys, hidden),
        "attention.value.weight": (keys, hidden),
        "attention.output.weight": (hidden, queries),
        "mlp.gate.weight": (inner, hidden),
        "mlp.up.weight": (inner, hidden),
        "mlp.down.weight": (hidden, inner),
    }
    norms = ("norm",) if model.block == "parallel" else ("attention_norm", "mlp_norm")
    for norm in norms:
        shapes[f"{norm}.weight"] = (hidden,)
    if scheme.qk_norm.kind != "none":
        for name, heads in (("query", model.num_heads), ("key", model.num_kv_heads)):
            shape: Shape = (model.head_dim,)
            if scheme.qk_norm.over == "projection":
                shape = (heads * model.head_dim,)
            elif scheme.qk_norm.weight == "per_head":
                shape = (heads, model.head_dim)
            shapes[f"attention.{name}_norm.weight"] = shape
    if isinstance(scheme.score_scale, SsmaxScale):
        shapes["attention.logit_scale"] = (model.num_heads,)
    return shapes


def layer_parameters(model: ModelConfig, scheme: AttentionScheme) -> int:
    """Parameters of one layer."""
    return sum(math.prod(shape) for shape in layer_shapes(model, scheme).values())


def parameters(model: ModelConfig) -> int:
    """Parameters of the model."""
    outside = model.hidden_size * (1 + model.vocab_size * (1 if model.tie_embeddings else 2))
    return outside + sum(
        count * layer_parameters(model, scheme) for scheme, count in model.layer_plan.counts()
    )


def attended_pairs(length: int, window: int | None) -> int:
    """(query, key) pairs that one layer computes for one document of `length` tokens."""
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * length - window * (window - 1) // 2


def attended_pairs_of(document_lengths: Iterable[int], window: int | None) -> int:
    """(query, key) pairs of one layer over documents that do not see each other."""
    return sum(attended_pairs(length, window) for length in document_lengths)


def mean_keys(length: int, window: int | None) -> float:
    """Mean keys per query in one document of `length` tokens."""
    return attended_pairs(length, window) / length


def matrix_parameters(model: ModelConfig) -> int:
    """Parameters that every token is multiplied with: all layers' matrices and the head."""
    projections = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
    layer = model.hidden_size * (projections + 3 * model.intermediate_size)
    return model.layer_plan.num_layers * layer + model.vocab_size * model.hidden_size


def training_flops(
    model: ModelConfig, document_lengths: Iterable[int], plan: LayerPlan | None = None
) -> int:
    """FLOPs of forward and backward over documents that do not see each other."""
    lengths = list(document_lengths)
    pairs = sum(
        count * attended_pairs_of(lengths, scheme.window)
        for scheme, count in (plan or model.layer_plan).counts()
    )
    per_pair = 12 * model.num_heads * model.head_dim
    return 6 * matrix_parameters(model) * sum(lengths) + per_pair * pairs


def flops_per_token(model: ModelConfig, length: int, plan: LayerPlan | None = None) -> float:
    """Training FLOPs per token when every row is one document of `length` tokens."""
    return training_flops(model, [length], plan) / length


def layer_flops_per_token(model: ModelConfig, scheme: AttentionScheme, length: int) -> float:
    """Training FLOPs per token of one layer, its matrices and its attention."""
    one = (matrix_parameters(model) - model.vocab_size * model.hidden_size) // (
        model.layer_plan.num_layers
    )
    attention = 12 * model.num_heads * model.head_dim * mean_keys(length, scheme.window)
    return 6 * one + attention


def full_attention(plan: LayerPlan) -> LayerPlan:
    """The same plan with every window removed."""
    schemes = {
        name: scheme.model_copy(update={"window": None}) for name, scheme in plan.schemes.items()
    }
    return plan.model_copy(update={"schemes": schemes})


def ideal_speedup(model: ModelConfig, length: int, plan: LayerPlan | None = None) -> float:
    """FLOPs per token with full attention everywhere over FLOPs per token of the plan."""
    plan = plan or model.layer_plan
    full = flops_per_token(model, length, full_attention(plan))
    return full / flops_per_token(model, length, plan)


def layer_kv_cache_bytes(
    model: ModelConfig, scheme: AttentionScheme, length: int, bytes_per_value: int = 2
) -> int:
    """Keys and values that one layer keeps for one sequence of `length` tokens."""
    kept = length if scheme.window is None else min(length, scheme.window)
    return 2 * model.num_kv_heads * model.head_dim * kept * bytes_per_value


def kv_cache_bytes(
    model: ModelConfig, length: int, plan: LayerPlan | None = None, bytes_per_value: int = 2
) -> int:
    """Keys and values that all layers keep for one sequence of `length` tokens."""
    return sum(
        count * layer_kv_cache_bytes(model, scheme, length, bytes_per_value)
        for scheme, count in (plan or model.layer_plan).counts()
    )
