"""Exact counts from the config alone: parameters, attended pairs, training FLOPs, KV cache.

A multiply and an add are two FLOPs. Training is three forwards (forward, and backward to inputs
and to weights); matrix products only; the embedding lookup costs nothing and the head counts.
"""

import math
from collections.abc import Iterable, Sequence
from typing import assert_never

from megahybrid.config.attention import AttentionScheme, Nope, Rope, biased_projections
from megahybrid.config.fusion import learned_fuse
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import Activation, Block, ModelConfig
from megahybrid.config.score_scale import (
    FixedScale,
    Llama4Scale,
    LogFromScale,
    LogScale,
    PowerScale,
    SqrtDimScale,
    SsmaxScale,
)

Shape = tuple[int, ...]


def parameter_shapes(model: ModelConfig) -> dict[str, Shape]:
    """The global shape of every parameter by canonical name; tied weights once, vocabulary
    unpadded."""
    first, last = _before_layers(model), _after_layers(model)
    layers = {
        f"blocks.{index}.{name}": shape
        for index, scheme in enumerate(model.layer_plan.expand())
        for name, shape in layer_shapes(model, scheme).items()
    }
    return first | layers | last


def outside_shapes(model: ModelConfig) -> dict[str, Shape]:
    """The global shape of every parameter that belongs to no layer, by canonical name."""
    return _before_layers(model) | _after_layers(model)


def _before_layers(model: ModelConfig) -> dict[str, Shape]:
    return {"embedding.weight": (model.vocab_size, model.hidden_size)}


def _after_layers(model: ModelConfig) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {"final_norm.weight": _norm_shape(model)}
    if not model.tie_embeddings:
        shapes["head.weight"] = (model.vocab_size, model.hidden_size)
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
        **_mlp_shapes(model.activation, hidden, inner),
    }
    for name in biased_projections(scheme.bias):
        shapes[f"attention.{name}.bias"] = (queries if name == "query" else keys,)
    if scheme.sink:
        shapes["attention.sinks"] = (model.num_heads,)
    for norm in block_norms(model.block):
        shapes[f"{norm}.weight"] = _norm_shape(model)
    for name, heads in (("query", model.num_heads), ("key", model.num_kv_heads)):
        weight = scheme.qk_norm.weight_shape(heads, model.head_dim)
        if weight is not None:
            shapes[f"attention.{name}_norm.weight"] = weight
    gates = scheme.token_gates(model.num_heads, model.num_kv_heads, model.head_dim)
    for name, gate in gates.items():
        shapes[f"attention.{name}.weight"] = (gate.values, hidden)
    if scheme.fuse is not None and learned_fuse(scheme.fuse.gate):
        shapes["attention.fuse_gate.bias"] = (model.num_heads,)
    match scheme.position:
        case Rope() | Nope():
            pass
        case other:
            assert_never(other)
    match scheme.score_scale:
        case SqrtDimScale() | FixedScale():
            pass
        case Llama4Scale() | PowerScale() | LogScale() | LogFromScale():
            pass
        case SsmaxScale():  # under the name that it has in every checkpoint
            shapes["attention.logit_scale"] = (model.num_heads,)
        case never:
            assert_never(never)
    return shapes


def _mlp_shapes(activation: Activation, hidden: int, inner: int) -> dict[str, Shape]:
    """The shapes of an MLP's weights: every activation is of a gate."""
    match activation:
        case "silu" | "gelu_tanh":
            return {
                "mlp.gate.weight": (inner, hidden),
                "mlp.up.weight": (inner, hidden),
                "mlp.down.weight": (hidden, inner),
            }
        case never:
            assert_never(never)


def _norm_shape(model: ModelConfig) -> Shape:
    """The shape of the weight of a norm of the residual stream."""
    match model.norm:
        case "rms" | "layernorm":
            return (model.hidden_size,)
        case never:
            assert_never(never)


def block_norms(block: Block) -> tuple[str, ...]:
    """The names of a block's own norms."""
    match block:
        case "pre_norm" | "post_norm":
            return "attention_norm", "mlp_norm"
        case "sandwich":
            return "attention_norm", "attention_output_norm", "mlp_norm", "mlp_output_norm"
        case "parallel":
            return ("norm",)
        case never:
            assert_never(never)


def norms_read_by_products(block: Block) -> int:
    """Return how many of a block's norms give what a product reads."""
    match block:
        case "pre_norm" | "parallel":
            return len(block_norms(block))
        case "sandwich":  # the inner two
            return 2
        case "post_norm":  # the stream is added to what a norm gives
            return 0
        case never:
            assert_never(never)


def branches_together(block: Block) -> bool:
    """Return whether the gradients of both branches, attention and MLP, are held at a time."""
    match block:
        case "pre_norm" | "post_norm" | "sandwich":
            return False
        case "parallel":
            return True
        case never:
            assert_never(never)


def _is_matrix(name: str, shape: Shape) -> bool:
    """Return whether tokens are multiplied with a parameter: a norm's weight per head has
    two dimensions too, but is no matrix."""
    return len(shape) == 2 and not name.endswith("norm.weight")


def layer_parameters(model: ModelConfig, scheme: AttentionScheme) -> int:
    """Parameters of one layer."""
    return sum(math.prod(shape) for shape in layer_shapes(model, scheme).values())


def parameters(model: ModelConfig) -> int:
    """Parameters of the model."""
    outside = outside_shapes(model)
    return sum(math.prod(shape) for shape in outside.values()) + sum(
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


def scheme_pairs(document_lengths: Iterable[int], scheme: AttentionScheme) -> int:
    """(query, key) pairs of one layer of a scheme over documents that do not see each other."""
    if scheme.chunk is None:
        return attended_pairs_of(document_lengths, scheme.window)
    full = attended_pairs(scheme.chunk, None)
    return sum(
        length // scheme.chunk * full + attended_pairs(length % scheme.chunk, None)
        for length in document_lengths
    )


def kv_heads_of_views(scheme: AttentionScheme, kv_heads: int) -> list[tuple[AttentionScheme, int]]:
    """The scheme of each view of a layer, and how many of its key heads have it."""
    views = scheme.views()
    if scheme.split is None:
        return [(view, kv_heads) for view in views]
    near = sum(map(scheme.split.is_near, range(kv_heads)))
    return list(zip(views, (near, kv_heads - near), strict=True))


def head_pairs(document_lengths: Sequence[int], scheme: AttentionScheme, model: ModelConfig) -> int:
    """(query, key) pairs of one layer, summed over its query heads and their views."""
    group = model.num_heads // model.num_kv_heads
    return group * sum(
        count * scheme_pairs(document_lengths, view)
        for view, count in kv_heads_of_views(scheme, model.num_kv_heads)
    )


def mean_keys(length: int, window: int | None) -> float:
    """Mean keys per query in one document of `length` tokens."""
    return attended_pairs(length, window) / length


def matrix_parameters(model: ModelConfig) -> int:
    """Parameters that every token is multiplied with: all layers' matrices and the head."""
    layers = sum(
        count * layer_matrix_parameters(model, scheme)
        for scheme, count in model.layer_plan.counts()
    )
    return layers + model.vocab_size * model.hidden_size


def layer_matrix_parameters(model: ModelConfig, scheme: AttentionScheme) -> int:
    """Parameters of one layer that every token is multiplied with."""
    shapes = layer_shapes(model, scheme)
    return sum(math.prod(shape) for name, shape in shapes.items() if _is_matrix(name, shape))


def training_flops(
    model: ModelConfig, document_lengths: Iterable[int], plan: LayerPlan | None = None
) -> int:
    """FLOPs of forward and backward over documents that do not see each other."""
    lengths = list(document_lengths)
    pairs = sum(
        count * head_pairs(lengths, scheme, model)
        for scheme, count in (plan or model.layer_plan).counts()
    )
    return 6 * matrix_parameters(model) * sum(lengths) + 12 * model.head_dim * pairs


def flops_per_token(model: ModelConfig, length: int, plan: LayerPlan | None = None) -> float:
    """Training FLOPs per token when every row is one document of `length` tokens."""
    return training_flops(model, [length], plan) / length


def layer_flops_per_token(model: ModelConfig, scheme: AttentionScheme, length: int) -> float:
    """Training FLOPs per token of one layer, its matrices and its attention."""
    attention = 12 * model.head_dim * head_pairs([length], scheme, model) / length
    return 6 * layer_matrix_parameters(model, scheme) + attention


def full_attention(plan: LayerPlan) -> LayerPlan:
    """Return the plan with every window, chunk and second view removed."""
    everything = dict.fromkeys(("window", "chunk", "near", "fuse", "split"))
    schemes = {name: scheme.model_copy(update=everything) for name, scheme in plan.schemes.items()}
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
    kept = length if scheme.reach is None else min(length, scheme.reach)
    return 2 * model.num_kv_heads * model.head_dim * kept * bytes_per_value


def kv_cache_bytes(
    model: ModelConfig, length: int, plan: LayerPlan | None = None, bytes_per_value: int = 2
) -> int:
    """Keys and values that all layers keep for one sequence of `length` tokens."""
    return sum(
        count * layer_kv_cache_bytes(model, scheme, length, bytes_per_value)
        for scheme, count in (plan or model.layer_plan).counts()
    )
