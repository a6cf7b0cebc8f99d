"""A peer and ours in turns on one GPU, once both are seen to compute the same loss."""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.ours import build, keep, tally
from benchmarks.peers import Peer, peer_config, peer_of, title
from benchmarks.peers.peer import lent_loss, peer_step
from benchmarks.plan import Plan, fits
from benchmarks.shapes import hybrid
from benchmarks.steps import our_loss, our_model, our_step
from benchmarks.timing import in_turns, timed
from megahybrid.config.model import ModelConfig

# Both in bf16, on the same weights: each is off by some 1e-4 of what fp32 gives.
LOSS_BOUND = 2e-3


def against(plan: Plan, name: str, length: int) -> None:
    """One cell. The peer yields until it fits in memory: one row at a time, then recomputation,
    then our loss in the place of its own, which holds all logits."""
    config = peer_config(name, hybrid(plan.options.shape))
    tokens, targets = plan.batch(config, length)
    rows, label = tokens.shape[0], title(name)
    if (held := scores_bytes(name, config, length)) > plan.memory:
        plan.note(f"{label} at {length}: one layer's scores alone are {held / 2**30:.0f} GiB")
        return
    lent = "chunked" in name.split("+")
    ways = [(rows, False, lent), (1, False, lent), (1, True, lent), (1, True, True)]
    for micro_rows, checkpointing, chunked in dict.fromkeys(ways):
        peer, loss, expected = prepared(plan, name, config, tokens, targets, checkpointing, chunked)
        step = peer_step(peer, tokens, micro_rows, loss)
        first: list[float] = []
        if fits(lambda step=step, first=first: first.extend([step(), step()])):
            break
        del peer, loss, step
        plan.free()
    else:
        plan.note(
            f"{label} at {length}: out of memory, one row at a time, with recomputation and "
            "with our loss"
        )
        return
    if abs(first[0] / expected - 1) > LOSS_BOUND:
        raise ValueError(f"its loss is {first[0]:.5f} where ours is {expected:.5f}")
    errors = {"theirs": first[0], "ours": expected}
    how = [f"{micro_rows} rows at a time"]
    how += ["recomputation"] * checkpointing + ["our loss"] * chunked + [peer.how] * bool(peer.how)
    setting = ", ".join(how)
    once, _ = timed(step, plan.device)
    peak = plan.peak_gib()
    model, policies = build(plan, config, length, tokens.numel())
    mine = our_step(model, tokens, targets)
    most = 2 if plan.options.rehearse else 8
    rounds = max(2, min(most, int(0.25 * plan.left() / (2 * once))))
    if not fits(lambda: [mine(), step()]):
        # Both do not fit beside each other: the peer's own steps stand alone.
        del model, mine
        plan.free()
        walls = [timed(step, plan.device)[0] for _ in range(rounds)]
        keep(plan, label, config, length, tokens.numel(), walls, setting=setting, loss=errors)
        return
    times = in_turns([mine, step], plan.device, rounds, warm_up=1)
    ratio = statistics.median(times[1].wall) / statistics.median(times[0].wall)
    keep(
        plan,
        label,
        config,
        length,
        tokens.numel(),
        times[1].wall,
        setting=setting,
        loss=errors,
        ours_is=ratio,
        ours_walls=times[0].wall,
        recompute=tally(policies),
    )
    plan.rows[-1]["peak_gib"] = peak


def prepared(
    plan: Plan,
    name: str,
    config: ModelConfig,
    tokens: Tensor,
    targets: Tensor,
    checkpointing: bool,
    chunked: bool,
) -> tuple[Peer, Callable[[Tensor], Tensor] | None, float]:
    """The peer with our weights, the loss lent to it, and what its loss on `tokens` should be."""
    length = tokens.shape[1]
    kernels = plan.kernels_of_layers(config, length)
    ours = our_model(config, plan.device, plan.dtype, kernels=kernels)
    peer = peer_of(name, ours, length, checkpointing, kernels)
    with torch.no_grad():
        expected = float(our_loss(ours, tokens, targets))
    return peer, lent_loss(peer, ours) if chunked else None, expected


def scores_bytes(name: str, config: ModelConfig, length: int) -> int:
    """What megatron-core's own attention holds of one row in one layer: scores in bf16, their
    softmax in fp32."""
    model, *flags = name.split("+")
    return 6 * config.num_heads * length**2 if model == "megatron" and "patched" not in flags else 0
