"""Random batches for the oracle, and its training loop: one process, torch's own AdamW."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megahybrid.config.attention import AttentionScheme
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig
from tests.plain_model import IGNORED, PlainModel


@dataclass(frozen=True)
class MicroBatch:
    """What one rank sees in one forward: all [batch, seq] int64."""

    tokens: Tensor
    targets: Tensor
    starts: Tensor


@dataclass(frozen=True)
class PlainRun:
    """What a run gave: a loss and a norm per step (before clipping), the first step's gradients
    (before clipping) and the weights after the last step, by canonical name."""

    losses: list[float]
    norms: list[float]
    first_gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def random_batch(
    vocab_size: int, rows: int, seq: int, seed: int, ignored: float = 0.3, documents: bool = True
) -> MicroBatch:
    """Random tokens; documents start at random places; about `ignored` of the targets do not
    count (always at least one does)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, (rows, seq), generator=generator)
    targets = torch.randint(0, vocab_size, (rows, seq), generator=generator)
    dropped = torch.rand((rows, seq), generator=generator) < ignored
    dropped[0, 0] = False
    targets[dropped] = IGNORED
    begins = torch.rand((rows, seq), generator=generator) < 0.15
    begins[:, 0] = True
    if not documents:
        begins[:, 1:] = False
    places = torch.where(begins, torch.arange(seq).expand(rows, seq), 0)
    return MicroBatch(tokens, targets, places.cummax(dim=1).values)


def global_norm(gradients: Mapping[str, Tensor]) -> float:
    """The 2-norm of all gradients together."""
    return math.sqrt(sum(gradient.double().pow(2).sum().item() for gradient in gradients.values()))


def plain_adamw_run(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    steps: Sequence[Sequence[MicroBatch]],
    learning_rates: Sequence[float],
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-5,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
    decay: Callable[[str], float],
    multiplier: Callable[[str], float] = lambda name: 1.0,
    plan: LayerPlan | Sequence[AttentionScheme] | None = None,
    z_loss: float = 0.0,
) -> PlainRun:
    """Train a copy of `tensors`; `steps[n]` holds ALL micro batches of step n, of all data ranks.

    A step's loss is the sum of losses over the count of valid tokens of the whole step. By name,
    `decay` multiplies weight_decay (0: none) and `multiplier` the learning rate. What `z_loss` adds
    is in gradients and norms, not in losses.
    """
    leaves = {name: value.detach().clone().requires_grad_() for name, value in tensors.items()}
    groups = [
        {
            "params": [leaf],
            "name": name,
            "weight_decay": weight_decay * decay(name),
        }
        for name, leaf in leaves.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=eps, foreach=False)
    model = PlainModel(config, leaves, plan)
    losses, norms, first = [], [], {}
    for step, (micro_batches, rate) in enumerate(zip(steps, learning_rates, strict=True)):
        valid = sum(int((micro.targets != IGNORED).sum()) for micro in micro_batches)
        optimizer.zero_grad()
        total = 0.0
        for micro in micro_batches:
            loss_sum, _ = model.loss(micro.tokens, micro.targets, micro.starts)
            objective = loss_sum
            if z_loss:
                log_z = model.logits(micro.tokens, micro.starts).logsumexp(-1)
                objective = loss_sum + z_loss * log_z[micro.targets != IGNORED].square().sum()
            (objective / valid).backward()
            total += loss_sum.item()
        gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        losses.append(total / valid)
        norms.append(global_norm(gradients))
        if step == 0:
            first = {name: gradient.clone() for name, gradient in gradients.items()}
        shrink = clip_norm / (norms[-1] + 1e-6)
        if clip_norm > 0 and shrink < 1:
            for gradient in gradients.values():
                gradient.mul_(shrink)
        for group in optimizer.param_groups:
            group["lr"] = rate * multiplier(group["name"])
        optimizer.step()
    return PlainRun(losses, norms, first, {name: leaf.detach() for name, leaf in leaves.items()})


def plain_kind(name: str) -> str:
    """What a canonical tensor is counted as, by its name."""
    part = name.split(".")[-2]
    if part == "embedding" or part == "head":
        return part
    if part.endswith("norm"):
        return "norm"
    of_attention = ("query", "key", "value", "output", "output_gate", "fuse_gate")
    if part in of_attention or name.endswith(("attention.logit_scale", "attention.sinks")):
        return "attention"
    assert part in ("gate", "up", "down"), name
    return "mlp"


def plain_decay(name: str, width_ratio: float = 1.0) -> float:
    """What multiplies weight decay: nothing decays but matrices; under muP (`width_ratio` hidden /
    base_hidden) hidden matrices and the head decay by so much more as they learn more slowly."""
    if plain_kind(name) == "norm" or name.endswith(("logit_scale", ".bias", ".sinks")):
        return 0.0
    return 1.0 if name == "embedding.weight" else width_ratio


def plain_multiplier(name: str, width_ratio: float = 1.0) -> float:
    """What multiplies the learning rate: under muP all but the embedding and vectors learn so many
    times more slowly."""
    decays = plain_decay(name, width_ratio)
    return 1.0 if decays == 0.0 or name == "embedding.weight" else 1 / width_ratio
