"""Training steps to be timed: ours alone, ours through DeepSpeed, Hugging Face's Cohere2.

Every step is forward, backward and AdamW with the same numbers, without clipping: fp32 weights as
they are, bf16 weights with fp32 masters.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from benchmarks.cohere2 import cohere2, take_weights
from megahybrid.config.base import parse
from megahybrid.config.model import ModelConfig
from megahybrid.config.run import RunConfig
from megahybrid.config.training import OptimizerConfig
from megahybrid.model.init import initialise
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh

Step = Callable[[], float]
LEARNING_RATE = 1e-4


class MasterAdamW:
    """torch's fused AdamW; for bf16 weights on fp32 masters with fp32 moments."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.weights = list(parameters)
        self.masters = [
            weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float())
            for weight in self.weights
        ]
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    @torch.no_grad()
    def step(self) -> None:
        """One update; gradients are gone afterwards."""
        if self.masters[0] is not self.weights[0]:
            for master, weight in zip(self.masters, self.weights, strict=True):
                assert weight.grad is not None
                master.grad = weight.grad.float()
                weight.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.masters[0] is not self.weights[0]:
            torch._foreach_copy_(self.weights, self.masters)


def our_model(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    recompute: list[str] | None = None,
) -> Transformer:
    """Our model with its first weights, the same ones for the same shape."""
    # Drawn in fp32 on the host, like a run's first weights.
    model = Transformer(config, ParallelMesh.single(device), recompute=recompute)
    initialise(model, 1, OptimizerConfig())
    return model.to(dtype)


def our_loss(model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean loss over counting targets; a mask per batch is not needed: rows are one document."""
    total, _ = model(tokens, targets)
    return total / (tokens.shape[0] * (tokens.shape[1] - 1))


def our_step(model: Transformer, tokens: Tensor, targets: Tensor) -> Step:
    """Our model and AdamW without DeepSpeed."""
    optimizer = MasterAdamW(model.parameters())

    def step() -> float:
        loss = our_loss(model, tokens, targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def engine_step(model: Transformer, tokens: Tensor, targets: Tensor, precision: str) -> Step:
    """The step that `megahybrid train` takes: ZeRO 1, one rank, fp32 masters and accumulation.

    Joins a world of one; the caller leaves it.
    """
    from megahybrid.train.engine import Engine, MicroBatch

    rows, length = tokens.shape
    run = parse(
        RunConfig,
        {
            "model": model.config.model_dump(),
            "data": {"sources": {"none": {"path": "unused"}}, "block_tokens": length},
            "optimizer": {"clip_norm": None},
            "precision": precision,
            "stages": [
                {
                    "name": "bench",
                    "tokens": rows * length,
                    "lengths": {length: 1},
                    "batch_tokens": rows * length,
                    "micro_batch_tokens": rows * length,
                    "weights": {"none": 1},
                    "learning_rate": {
                        "kind": "linear",
                        "start": LEARNING_RATE,
                        "end": LEARNING_RATE,
                    },
                }
            ],
        },
    )
    engine = Engine(model, run, model.mesh)
    batch = MicroBatch(tokens, targets, None)
    return lambda: engine.train_step([batch], LEARNING_RATE).loss


def peer_model(
    ours: Transformer, longest: int, attention: str, *, compiled: bool, checkpointing: bool = False
) -> nn.Module:
    """Cohere2 with our weights, device and dtype, in the given setting."""
    weight = ours.embedding.weight
    peer = cohere2(ours.config, longest, attention, weight.device, weight.dtype)
    take_weights(peer, ours)
    if checkpointing:
        peer.gradient_checkpointing_enable({"use_reentrant": False})
    if compiled:
        peer.compile()
    return peer


def peer_step(peer: nn.Module, tokens: Tensor) -> Step:
    """Cohere2's own loss and AdamW. It shifts the labels itself."""
    optimizer = MasterAdamW(peer.parameters())

    def step() -> float:
        loss = peer(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
