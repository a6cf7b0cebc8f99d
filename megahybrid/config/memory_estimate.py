"""Memory of one rank by ZeRO stage: an estimate from formulas, in bytes.

States per parameter, bf16 (N replicas, data times context ranks): weights 2, gradients accumulated
in fp32 (4 where they are whole, 2 / N where they are cut), fp32 master and two moments 12 / N.

Activations per token and layer, in values: norm inputs and outputs 2 d each norm (the parallel
block has one); q, k, v, gate and up as the product wrote them, dq + 2 dkv + 2 f, all alive while
one of them is; rotated q and k, dq + dkv; attention's output and its copy in the other layout,
2 dq; where it is gated, the gate and dq; the MLP's product f. Selective recomputation drops f and
the outputs of norms that are read by a product; chunked gate and up, 2 f, as well; full keeps the
layer's input, d. The tensor degree divides them all, and the context axis the tokens
(context_memory.py).

Beside what all layers keep stands the larger of two things: the loss with a chunk of logits, at the
end of the forward pass, and one layer's backward.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

from megahybrid.config import chunk_sizes
from megahybrid.config.attention import gate_shape
from megahybrid.config.context_memory import ALONE, ContextMemory, context_memory
from megahybrid.config.counting import (
    Shape,
    block_norms,
    branches_together,
    layer_flops_per_token,
    layer_shapes,
    norms_read_by_products,
    outside_shapes,
)
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig
from megahybrid.config.run import RunConfig
from megahybrid.config.stages import Recompute, RecomputeBudget, Stage
from megahybrid.errors import ConfigError

# From the least to the most that is computed again.
POLICIES: tuple[Recompute, ...] = ("none", "selective", "chunked", "full", "offload")
# The vocabulary is padded to a multiple of this and the tensor degree.
VOCABULARY_MULTIPLE = 8


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # kept between forward and backward
    working: int  # the loss or one layer's backward, whichever needs more

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


def local_parameters(model: ModelConfig, tensor: int) -> int:
    """Parameters that one rank of `tensor` tensor ranks holds, before ZeRO."""
    outside = outside_shapes(model)
    local = sum(_local(model, name, shape, tensor) for name, shape in outside.items())
    for scheme, count in model.layer_plan.counts():
        shapes = layer_shapes(model, scheme)
        # Names within a block are told apart by the dot before them.
        local += count * sum(_local(model, f".{name}", shapes[name], tensor) for name in shapes)
    return local


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


def states_per_parameter(
    precision: str, zero_stage: int, replicas: int, offload: str = "none"
) -> tuple[float, ...]:
    """Bytes per local parameter of weights, gradients and optimizer, on the device."""
    n = replicas
    if precision == "fp32":
        weights, gradients, optimizer = 4.0, 4.0, 8.0 if zero_stage == 0 else 12.0
    else:
        # Gradients are summed in fp32 where they are whole; ZeRO 2 and 3 keep bf16 slices.
        weights, gradients, optimizer = 2.0, 4.0 if zero_stage <= 1 else 2.0, 12.0
    optimizer -= 8.0 * (offload == "moments")
    return (
        weights / n if zero_stage >= 3 else weights,
        gradients / n if zero_stage >= 2 else gradients,
        optimizer / n if zero_stage >= 1 else optimizer,
    )


def activation_bytes_per_token(
    model: ModelConfig, policy: str, bytes_per_value: int = 2, device: str = "cuda"
) -> int:
    """Bytes of one layer that are kept for backward, per token, at tensor degree 1."""
    hidden, inner = model.hidden_size, model.intermediate_size
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    norms = len(block_norms(model.block))
    whole = 2 * norms * hidden + 4 * queries + 3 * keys + 3 * inner
    gates = [
        (gate_shape(scheme.gate, model.num_heads, model.num_kv_heads, model.head_dim), count)
        for scheme, count in model.layer_plan.counts()
    ]
    # A gate, and the gated output beside the output.
    gated = sum(count * (queries + gate.values) for gate, count in gates if gate is not None)
    whole += gated // model.layer_plan.num_layers
    # Two views: queries and keys of the second, and the outputs of both beside what joins them.
    twofold = sum(count for scheme, count in model.layer_plan.counts() if scheme.near is not None)
    whole += (3 * queries + keys) * twofold // model.layer_plan.num_layers
    if device == "cpu":
        views = [(v, n) for scheme, n in model.layer_plan.counts() for v in scheme.views()]
        windowed = sum(count for view, count in views if view.reach is not None)
        # Blocks of queries and keys are copies.
        whole += (queries + 2 * keys) * windowed // model.layer_plan.num_layers
        match model.norm:
            case "rms":  # it has no kernel there and keeps one value more
                whole += norms * hidden
            case "layernorm":
                pass
            case never:
                assert_never(never)
    dropped = inner + norms_read_by_products(model.block) * hidden
    kept = {
        "none": whole,
        "selective": whole - dropped,
        "chunked": whole - dropped - 2 * inner,
        "full": hidden,
        "offload": 0,
    }
    return kept[policy] * bytes_per_value


class MicroBatch:
    """The memory of one micro batch of `tokens` on a group of context ranks, for one of them and
    beside the states, for any policies of the layers: worked out once for each policy, because a
    budget tries thousands of lists."""

    def __init__(
        self,
        model: ModelConfig,
        tokens: int,
        tensor: int,
        precision: str,
        device: str,
        context: ContextMemory = ALONE,
    ) -> None:
        width, tokens = _width(precision), tokens // context.axis
        self._tokens, self._tensor, self._context = tokens, tensor, context
        self._per_token = {
            policy: activation_bytes_per_token(model, policy, width, device) for policy in POLICIES
        }
        self._kept = {policy: size * tokens // tensor for policy, size in self._per_token.items()}
        self._backward = {
            policy: _one_backward(model, policy, tokens, tensor, width, device)
            for policy in POLICIES
        }
        self._loss = _loss(model, tokens, tensor, precision, device)
        # A tied head's gradient waits for the embedding's.
        head = -(-model.vocab_size // tensor) * model.hidden_size
        self._waiting = width * head * model.tie_embeddings

    def activations(self, policies: Sequence[Recompute]) -> int:
        """Return the bytes that all layers keep for backward."""
        per_token = sum(count * self._per_token[p] for p, count in Counter(policies).items())
        kept = zip(policies, self._context.kept, strict=False)  # no layer has any without context
        crossed = sum(size for policy, size in kept if policy not in ("full", "offload"))
        return per_token * self._tokens // self._tensor + crossed

    def working(self, policies: Sequence[Recompute]) -> int:
        """The most that stands beside the kept activations: in the loss, or in one layer's
        backward. In backward a layer's own memory goes when it is done."""
        left, gone = set(policies), 0  # gone: what the layers above have kept
        found: list[int] = []
        for policy in reversed(policies):
            if policy in left:
                # The last layer of a policy: of those below it with the same, more has gone.
                found.append(self._backward[policy] - gone)
                left.discard(policy)
                if not left:
                    break
            gone += self._kept[policy]
        anew = max(self._context.kept, default=0) if {"full", "offload"} & set(policies) else 0
        crossing = self._context.working + anew
        return max(self._loss, self._waiting + max(found) + crossing)


def activations(
    model: ModelConfig,
    policies: Sequence[Recompute],
    tokens: int,
    tensor: int,
    precision: str,
    device: str,
) -> int:
    """Return the bytes that all layers keep of one micro batch of `tokens`, on one rank."""
    return MicroBatch(model, tokens, tensor, precision, device).activations(policies)


def working(
    model: ModelConfig,
    policies: Sequence[Recompute],
    tokens: int,
    tensor: int,
    precision: str,
    device: str,
) -> int:
    """The most that stands beside the kept activations, on one rank."""
    return MicroBatch(model, tokens, tensor, precision, device).working(policies)


def _loss(model: ModelConfig, tokens: int, tensor: int, precision: str, device: str) -> int:
    """Return the bytes that the loss needs at the end of the forward pass."""
    width, hidden = _width(precision), model.hidden_size
    local_vocab = -(-model.vocab_size // tensor)
    chunk = min(chunk_sizes.LOSS_CHUNK_BYTES[device], width * local_vocab * tokens)
    # The logits' derivative, in lower precision beside fp32 logits of a part; the head's fp32
    # gradient, which a CPU adds to by way of a product and a copy of it; the final norm's input and
    # output and the gradient of the gathered input.
    logits = chunk if precision == "fp32" else chunk + 4 * chunk // (width * chunk_sizes.LOSS_PARTS)
    if model.logit_softcap is not None:  # exponentials beside the tanh that its derivative needs
        logits += chunk if precision == "fp32" else logits - chunk
    loss = logits + 4 * local_vocab * hidden * (3 if device == "cpu" else 1)
    return loss + width * tokens * hidden * 3


def _one_backward(
    model: ModelConfig, policy: str, tokens: int, tensor: int, width: int, device: str
) -> int:
    """Return the bytes of one layer's backward beside those that the layers up to it keep: the
    layer anew under full recomputation, and gradients of the stream, of gate and up, of heads."""
    hidden, inner = model.hidden_size, model.intermediate_size
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    heads = queries + 2 * keys
    again = policy in ("full", "offload")
    anew = 0
    if again:  # but for its input, where that has been kept
        anew = activation_bytes_per_token(model, "none", width, device) * tokens // tensor
        anew -= activation_bytes_per_token(model, policy, width, device) * tokens // tensor
    if policy == "offload" and device != "cpu":  # the input of the layer below arrives meanwhile
        anew += width * hidden * tokens // tensor
    parallel = branches_together(model.block)
    if not (policy == "chunked" or (again and tokens > chunk_sizes.CHUNK_TOKENS)):
        # Beside the product, where that is computed again. Only the parallel block has the
        # gradients of both branches at a time.
        gate_up = (3 if policy == "selective" else 2) * inner
        both = gate_up + heads if parallel else max(gate_up, heads)
        return anew + width * (hidden + both) * tokens // tensor
    # Gate, up and what is made of them stand for one chunk, three weights' gradients in fp32, which
    # a CPU adds to by way of a product; the MLP's input and its gradient are whole on every rank.
    anew -= again * width * 3 * inner * tokens // tensor
    chunk = width * 5 * inner * min(tokens, chunk_sizes.CHUNK_TOKENS) // tensor
    chunk += 4 * 3 * hidden * inner // tensor * (2 if device == "cpu" else 1)
    chunk += width * (1 if again and tensor == 1 else 2) * hidden * tokens
    if parallel:  # its attention has gone by then, but for the gradients
        chunk += width * (heads - 4 * queries - 3 * keys) * tokens // tensor
    # Attention's own: gradients of what it gave and of the queries; on a GPU those of the queries
    # again in fp32, and of keys and values for each query head; on a CPU about four copies of each
    # block of keys and values.
    of_attention = 2 * queries + (8 * keys if device == "cpu" else 4 * queries + 2 * keys)
    if again and not parallel:  # the MLP's norm has gone by then
        of_attention -= 2 * hidden
    return (
        anew
        + width * hidden * tokens // tensor
        + max(width * of_attention * tokens // tensor, chunk)
    )


def _width(precision: str) -> int:
    return 4 if precision == "fp32" else 2


def memory_per_rank(
    model: ModelConfig,
    stage: Stage,
    *,
    tensor: int,
    data_degree: int,
    zero_stage: int,
    precision: str,
    device: str = "cuda",
    policies: Sequence[Recompute] | None = None,
    offload: str = "none",
    context: ContextMemory = ALONE,
) -> Memory:
    """Return the memory of one rank at the fullest moment of a step. `policies` has the recompute
    policy of each layer; the stage's own when left out, where it names them."""
    replicas = data_degree * context.axis
    local = local_parameters(model, tensor)
    weights, gradients, optimizer = states_per_parameter(precision, zero_stage, replicas, offload)
    if policies is None and isinstance(stage.recompute, RecomputeBudget):
        policies = policies_within(
            model,
            stage,
            model.layer_plan,
            int(stage.recompute.budget_gib * 2**30),
            tensor=tensor,
            data_degree=data_degree,
            zero_stage=zero_stage,
            precision=precision,
            device=device,
            offload=offload,
            context=context,
        )
    if policies is None:
        policies = [stage.recompute_of_layer(n) for n in range(model.layer_plan.num_layers)]
    batch = MicroBatch(model, stage.micro_batch_tokens, tensor, precision, device, context)
    return Memory(
        weights=int(local * weights),
        gradients=int(local * gradients),
        optimizer=int(local * optimizer) + (_visitors(local) if offload == "moments" else 0),
        activations=batch.activations(policies),
        working=batch.working(policies),
    )


def _visitors(local: int) -> int:
    """Bytes of the pieces of both off-loaded moments that are on the device, in fp32."""
    return 8 * chunk_sizes.OFFLOAD_ROOMS * min(chunk_sizes.OFFLOAD_PIECE, local)


def policies_of(run: RunConfig, index: int, data_degree: int) -> list[Recompute]:
    """The recompute policy of each layer in stage `index`: as named, or solved for its budget.

    Raises ConfigError where a budget cannot be met.
    """
    stage, plan = run.stages[index], run.plan_at(index)
    if not isinstance(stage.recompute, RecomputeBudget):
        return [stage.recompute_of_layer(layer) for layer in range(plan.num_layers)]
    budget = stage.recompute.budget_gib
    where: dict[str, Any] = {
        "tensor": run.parallel.tensor,
        "data_degree": data_degree,
        "zero_stage": run.parallel.zero_stage,
        "precision": run.precision,
        "device": "cpu" if run.device == "cpu" else "cuda",
        "offload": run.parallel.offload,
        "context": context_memory(run, index),
    }
    policies = policies_within(run.model, stage, plan, int(budget * 2**30), **where)
    needed = memory_per_rank(run.model, stage, policies=policies, **where).total / 2**30
    if needed > budget:
        raise ConfigError(
            f"stages.{index}.recompute.budget_gib={budget:g} is less than a step takes with every "
            f"layer recomputed and off-loaded ({needed:.3g} GiB). Lower "
            f"stages.{index}.micro_batch_tokens={stage.micro_batch_tokens}, or raise "
            f"parallel.tensor={run.parallel.tensor} or "
            f"parallel.zero_stage={run.parallel.zero_stage}."
        )
    return policies


def policies_within(
    model: ModelConfig, stage: Stage, plan: LayerPlan, budget_bytes: int, **where: Any
) -> list[Recompute]:
    """The policies that fit at the fewest extra FLOPs: none where it fits; else selective, which
    repeats no product, on as many layers as it takes; else chunked, which repeats the one with gate
    and up; else full on as few as it takes, those with the fewest FLOPs first; then off-loaded as
    well, where even that does not fit."""
    tensor, precision = where["tensor"], where["precision"]
    device = where.get("device", "cuda")
    context = where.get("context", ALONE)
    batch = MicroBatch(model, stage.micro_batch_tokens, tensor, precision, device, context)
    start: list[Recompute] = ["none"] * plan.num_layers
    whole = memory_per_rank(model, stage, policies=start, **where)
    states = whole.weights + whole.gradients + whole.optimizer

    def fits(policies: list[Recompute]) -> bool:
        return states + batch.activations(policies) + batch.working(policies) <= budget_bytes

    length = max(stage.lengths)
    flops = [layer_flops_per_token(model, scheme, length) for scheme in plan.expand()]
    cheapest = sorted(range(len(flops)), key=lambda layer: (flops[layer], layer))
    policies = start
    for policy in POLICIES[1:]:
        for layer in cheapest:
            if fits(policies):
                return _relaxed(policies, fits)
            policies[layer] = policy
    return policies


def _relaxed(policies: list[Recompute], fits: Callable[[list[Recompute]], bool]) -> list[Recompute]:
    """Selective and chunked taken back where what was done after them left the room."""
    steps: tuple[tuple[Recompute, Recompute], ...] = (
        ("chunked", "selective"),
        ("selective", "none"),
    )
    for taken, back in steps:
        for layer, policy in enumerate(policies):
            if policy == taken:
                tried = [*policies[:layer], back, *policies[layer + 1 :]]
                policies = tried if fits(tried) else policies
    return policies
