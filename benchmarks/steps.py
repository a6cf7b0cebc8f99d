"""Training steps to be timed: ours alone and ours through DeepSpeed.

Every step is forward, backward, clipping and AdamW with the same numbers: fp32 weights as they are,
bf16 weights with fp32 masters.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from megahybrid.config.model import ModelConfig
from megahybrid.config.parsing import parse
from megahybrid.config.run import RunConfig
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh

Step = Callable[[], float]
LEARNING_RATE = 1e-4
CLIP_NORM = 1.0


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
        nn.utils.clip_grad_norm_(self.masters, CLIP_NORM, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.masters[0] is not self.weights[0]:
            torch._foreach_copy_(self.weights, self.masters)


def our_model(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    recompute: list[str] | None = None,
    kernels: list[str] | None = None,
) -> Transformer:
    """Our model with its first weights, the same ones for the same shape."""
    model = Transformer(config, ParallelMesh.single(device), recompute=recompute, kernels=kernels)
    # Drawn on the device: the run's own keyed draws take the host a minute at a billion weights.
    generator = torch.Generator(device).manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=config.initial_std, generator=generator)
    return model.to(dtype)


def our_loss(
    model: nn.Module, tokens: Tensor, targets: Tensor, starts: Tensor | None = None
) -> Tensor:
    """Mean loss over counting targets; rows are one document each unless `starts` says more."""
    total, _ = model(tokens, targets, starts)
    return total / (tokens.shape[0] * (tokens.shape[1] - 1))


def our_step(
    model: Transformer,
    tokens: Tensor,
    targets: Tensor,
    micro_rows: int = 0,
    starts: Tensor | None = None,
) -> Step:
    """Our model and AdamW without DeepSpeed, `micro_rows` rows at a time (0: all)."""
    rows = micro_rows or len(tokens)
    begins = [None] * len(tokens) if starts is None else starts.split(rows)
    pieces = list(zip(tokens.split(rows), targets.split(rows), begins, strict=False))
    return update_after(model, [lambda piece=piece: our_loss(model, *piece) for piece in pieces])


def update_after(model: nn.Module, losses: list[Callable[[], Tensor]]) -> Step:
    """Backward of the mean of `losses`, one after the other, then the update."""
    optimizer = MasterAdamW(model.parameters())

    def step() -> float:
        total = 0.0
        for make in losses:
            loss = make() / len(losses)
            loss.backward()
            total = total + loss.detach()
        optimizer.step()
        return float(total)

    return step


def engine_step(
    model: Transformer,
    tokens: Tensor,
    targets: Tensor,
    precision: str,
    micro_rows: int = 0,
    offload: str = "none",
    starts: Tensor | None = None,
    context: int = 1,
) -> Step:
    """The step that `megahybrid train` takes: ZeRO 1, fp32 masters and accumulation, clipping,
    `micro_rows` rows at a time (0: all). `starts` (on the host) cut rows into documents; `context`
    is the model's context degree.

    One rank without a world joins one of its own; the caller leaves it.
    """
    from megahybrid.train.engine import Engine, MicroBatch

    rows, length = tokens.shape
    micro_rows = micro_rows or rows
    run = parse(
        RunConfig,
        {
            "model": model.config.model_dump(),
            "parallel": {"offload": offload, "context": context},
            "data": {"sources": {"none": {"path": "unused"}}, "block_tokens": length},
            "optimizer": {"clip_norm": CLIP_NORM},
            "precision": precision,
            "stages": [
                {
                    "name": "bench",
                    "tokens": rows * length,
                    "lengths": {length: 1},
                    "batch_tokens": rows * length,
                    "micro_batch_tokens": micro_rows * length,
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
    begins = [None] * rows if starts is None else starts.split(micro_rows)
    pieces = zip(tokens.split(micro_rows), targets.split(micro_rows), begins, strict=False)
    batches = [MicroBatch(*piece) for piece in pieces]
    return lambda: engine.train_step(batches, LEARNING_RATE).loss
