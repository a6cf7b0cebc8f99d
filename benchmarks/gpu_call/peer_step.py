"""A peer's step alone in its process, once its loss is seen to be ours: nothing that our compiled
layers change in the compiler reaches it."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_call.setting import Setting, fits
from benchmarks.gpu_call.step import PEAK, REACHABLE
from benchmarks.peers import Peer, peer_config, peer_of, title
from benchmarks.peers.peer import lent_loss, peer_step
from benchmarks.steps import our_loss, our_model
from benchmarks.timing import timed
from megahybrid.config.counting import flops_per_token
from megahybrid.config.model import ModelConfig

# Both in bf16, on the same weights: each is off by some 1e-4 of what fp32 gives.
LOSS_BOUND = 2e-3


def measured(setting: Setting, name: str, length: int, steps: int) -> dict[str, Any]:
    """One cell. The peer yields until it fits in memory: our micro-batch, one row at a time, then
    recomputation, then our loss in the place of its own, which holds all logits."""
    config = peer_config(name, setting.hybrid())
    facts = {"peer": name, "title": title(name), "length": length}
    tokens, targets = setting.batch(config, length)
    if (held := scores_bytes(name, config, length)) > setting.memory:
        return facts | {"left_out": f"one layer's scores alone are {held / 2**30:.0f} GiB"}
    lent = "chunked" in name.split("+")
    rows = setting.micro_rows_of(length)
    ways = [(rows, False, lent), (1, False, lent), (1, True, lent), (1, True, True)]
    for micro_rows, checkpointing, chunked in dict.fromkeys(ways):
        peer, loss, expected = prepared(
            setting, name, config, tokens, targets, checkpointing, chunked
        )
        step = peer_step(peer, tokens, micro_rows, loss)
        losses: list[float] = []
        if fits(lambda step=step, losses=losses: losses.extend([step(), step()])):
            break
        del peer, loss, step
        setting.free()
    else:
        return facts | {"left_out": "does not fit, with one row, recomputation and our loss"}
    if abs(losses[0] / expected - 1) > LOSS_BOUND:
        return facts | {"left_out": f"its loss is {losses[0]:.5f} where ours is {expected:.5f}"}
    how = [f"{micro_rows} rows at a time"]
    how += ["recomputation"] * checkpointing + ["our loss"] * chunked + [peer.how] * bool(peer.how)
    walls = [timed(step, setting.device)[0] for _ in range(steps)]
    speed = tokens.numel() / statistics.median(walls)
    flops = flops_per_token(config, length)
    return facts | {
        "setting": ", ".join(how),
        "loss": {"theirs": losses[0], "ours": expected},
        "tokens_per_step": tokens.numel(),
        "steps": len(walls),
        "tokens_per_second": speed,
        "mfu_989": speed * flops / PEAK,
        "mfu_790": speed * flops / REACHABLE,
        "peak_gib": setting.peak_gib(),
        "walls": walls,
    }


def prepared(
    setting: Setting,
    name: str,
    config: ModelConfig,
    tokens: Tensor,
    targets: Tensor,
    checkpointing: bool,
    chunked: bool,
) -> tuple[Peer, Callable[[Tensor], Tensor] | None, float]:
    """The peer with our weights, the loss lent to it, and what its loss on `tokens` should be."""
    length = tokens.shape[1]
    kernels = setting.kernels_of_layers(config, length)
    ours = our_model(config, setting.device, setting.dtype, kernels=kernels)
    peer = peer_of(name, ours, length, checkpointing, kernels)
    with torch.no_grad():
        rows = zip(tokens.split(1), targets.split(1), strict=True)
        expected = sum(float(our_loss(ours, *row)) for row in rows) / len(tokens)
    return peer, lent_loss(peer, ours) if chunked else None, expected


def scores_bytes(name: str, config: ModelConfig, length: int) -> int:
    """What megatron-core's own attention holds of one row in one layer: scores in bf16, their
    softmax in fp32."""
    model, *flags = name.split("+")
    return 6 * config.num_heads * length**2 if model == "megatron" and "patched" not in flags else 0
