"""Another library's model with our weights, and what is asked of every one of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.steps import Step, update_after
from megahybrid.config.model import ModelConfig
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.sharding import attach_shard_spec, shard_spec
from megahybrid.parallel.vocab import VocabParallelHead

# Tensors by our canonical names to tensors by the peer's names, in its layout.
Layout = Callable[[ModelConfig, dict[str, Tensor]], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True)
class Peer:
    """A model of another library in one setting. Rows are one document each."""

    module: nn.Module
    layout: Layout
    embedding: nn.Parameter  # tied
    loss: Callable[[Tensor], Tensor]  # tokens [batch, seq] to the mean over its targets
    hidden: Callable[[Tensor], Tensor]  # tokens [batch, seq] to [seq, batch, hidden], normed
    how: str = ""  # what its table row should say of it


def take_weights(peer: Peer, ours: Transformer) -> Peer:
    """Set the peer's weights to ours."""
    theirs = dict(peer.module.named_parameters())
    left = set(theirs)
    with torch.no_grad():
        for name, tensor in peer.layout(ours.config, dict(canonical(ours, grads=False))):
            theirs[name].copy_(tensor)
            left.discard(name)
    if left:
        raise ValueError(f"{sorted(left)} of the peer have no counterpart in ours")
    return peer


def canonical(ours: Transformer, grads: bool) -> Iterator[tuple[str, Tensor]]:
    """Our weights, or their gradients, by canonical name (one process)."""
    for parameter, spec in ours.sharded_parameters().values():
        value = parameter.grad if grads else parameter
        assert value is not None, spec.segments[0].name
        yield from spec.join([(spec, value.detach())]).items()


def gradient_errors(ours: Transformer, peer: Peer) -> dict[str, float]:
    """‖our gradient - theirs‖ / ‖theirs‖ of each tensor, by the peer's names."""
    theirs = dict(peer.module.named_parameters())
    return {
        name: relative_error(gradient, theirs[name].grad)
        for name, gradient in peer.layout(ours.config, dict(canonical(ours, grads=True)))
    }


def relative_error(ours: Tensor, theirs: Tensor | None) -> float:
    """‖a - b‖₂ / ‖b‖₂ in float64."""
    assert theirs is not None
    a, b = ours.detach().double(), theirs.detach().double()
    return ((a - b).norm() / b.norm()).item()


def lent_loss(peer: Peer, ours: Transformer) -> Callable[[Tensor], Tensor]:
    """Our chunked loss on the peer's own embedding: a loss that holds all logits is the first thing
    not to fit."""
    config = ours.config
    attach_shard_spec(peer.embedding, shard_spec(ours.embedding.weight))
    head = VocabParallelHead(
        config.vocab_size, config.hidden_size, "embedding.weight", ours.mesh, weight=peer.embedding
    )

    def loss(tokens: Tensor) -> Tensor:
        targets = torch.full_like(tokens, -100)
        targets[:, :-1] = tokens[:, 1:]
        total, _ = head(peer.hidden(tokens), targets, config.logit_scale)
        return total / targets[:, :-1].numel()

    return loss


def peer_step(
    peer: Peer,
    tokens: Tensor,
    micro_rows: int = 0,
    loss: Callable[[Tensor], Tensor] | None = None,
) -> Step:
    """Forward, backward and AdamW, `micro_rows` rows at a time (0: all), by its own loss or one
    that was lent to it."""
    pieces = tokens.split(micro_rows or len(tokens))
    one = loss or peer.loss
    return update_after(peer.module, [lambda piece=piece: one(piece) for piece in pieces])
