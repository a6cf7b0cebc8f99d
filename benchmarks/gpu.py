"""The plan for one GPU: ours hybrid and full at each length, then Hugging Face's Cohere2 in turns
with ours, the engine, and the kernels alone. Made to finish within one call of nine minutes.

Parts come in the order of their worth. A part that fails is told and the plan goes on; a part for
which no time is left is told too. `--rehearse` runs all of it on the CPU with the tiny shape.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import kernels, recompute
from benchmarks.cohere2 import gradient_errors
from benchmarks.machine import heading, machine, write
from benchmarks.shapes import full, hybrid, random_batch
from benchmarks.steps import (
    Step,
    engine_step,
    lent_head,
    our_loss,
    our_model,
    our_step,
    peer_loss,
    peer_model,
    peer_step,
)
from benchmarks.timing import in_turns, synchronise, timed
from megahybrid.config.counting import flops_per_token, full_attention, ideal_speedup
from megahybrid.config.model import ModelConfig
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import initialise_distributed, shutdown_distributed

PEAK, REACHABLE = 989e12, 790e12  # the data sheet's dense bf16, and what large products reach
TOKENS_PER_STEP = 32768
MUST, GOAL = {8192: 0.42, 32768: 0.38, 131072: 0.34}, {8192: 0.50, 32768: 0.47, 131072: 0.42}
MEMORY_SHARE = 0.86  # of the card, for the policy: the rest is fragments and work space


class Plan:
    """What is measured, where, and until when."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device("cpu" if options.rehearse else "cuda:0")
        self.deadline = time.monotonic() + options.budget_seconds
        self.memory = (
            8 * 2**30
            if options.rehearse
            else torch.cuda.get_device_properties(self.device).total_memory
        )
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def left(self) -> float:
        """Seconds until the plan should end."""
        return self.deadline - time.monotonic()

    def part(self, name: str, seconds: float, run: Callable[[], Any]) -> Any:
        """`run()`, unless less than `seconds` are left; a failure is a note."""
        if self.left() < seconds:
            self.note(f"{name}: not run, {self.left():.0f} s were left and it wants {seconds:.0f}")
            return None
        started = time.monotonic()
        try:
            return run()
        except Exception as error:  # a peer may fail in any way; the other parts still count
            lines = str(error).splitlines()
            self.note(f"{name}: {type(error).__name__}: {lines[0][:160] if lines else ''}")
            return None
        finally:
            self.free()
            print(f"  [{time.monotonic() - started:5.1f} s] {name}", flush=True)

    def note(self, text: str) -> None:
        """Something for the end of the table."""
        self.notes.append(text)
        print(f"  {text}", flush=True)

    def free(self) -> None:
        """Give memory of the last part back."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self) -> float:
        """The most that tensors took since the last `free`."""
        if self.device.type != "cuda":
            return 0.0
        return torch.cuda.max_memory_allocated(self.device) / 2**30

    def batch(self, config: ModelConfig, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One step's rows: at least one, else TOKENS_PER_STEP tokens (two in a rehearsal)."""
        rows = 2 if self.options.rehearse else max(1, TOKENS_PER_STEP // length)
        return random_batch(config, rows, length, self.device)


def run_plan(options: argparse.Namespace) -> int:
    """Everything, then the table and the JSON. Exit code 1 where the gate does not hold."""
    if options.rehearse:
        options.shape, options.lengths = "tiny", [64, 128]
        options.peers = options.rehearsed_peers
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no CUDA device. Use --rehearse to try the plan on CPU.")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    plan = Plan(options)
    facts = machine(plan.device)
    print(heading(facts), flush=True)
    held = gate(plan)
    plan.free()
    for length in options.lengths:
        ours(plan, "hybrid", hybrid(options.shape), length, options.steps)
    for length in options.lengths:
        ours(plan, "full", full(options.shape), length, max(options.steps // 2, 5))
    for length in options.lengths:
        for name in options.peers:
            label = f"transformers {name} at {length}"
            plan.part(label, 40, lambda name=name, length=length: against(plan, name, length))
    first = options.lengths[0]
    plan.part("engine", 25, lambda: through_engine(plan, first))
    compiled = f"hybrid at {first}, blocks compiled"
    plan.part(compiled, 60, lambda: one(plan, "hybrid, compiled", hybrid(options.shape), first, 10))
    table = plan.part("kernels", 30, lambda: kernel_rows(plan)) or []
    path = write(
        "train_step_rehearsal" if options.rehearse else "train_step_cuda",
        {
            "machine": facts,
            "shape": options.shape,
            "gate": held,
            "rows": plan.rows,
            "kernels": table,
            "notes": plan.notes,
        },
    )
    if table:
        print(kernels.table(table))
    print(summary(plan))
    print(f"all times: {path}")
    return 0


def gate(plan: Plan) -> dict[str, float]:
    """One period of layers in bf16, ours and theirs, against theirs in fp32: our error may be at
    most twice theirs, in the loss and in the gradients together."""
    shape, rehearse = plan.options.shape, plan.options.rehearse
    length = 64 if rehearse else 2048
    config = hybrid(shape, window=16 if rehearse else 512)
    layers = config.layer_plan.model_copy(update={"num_layers": 4})
    config = config.model_copy(update={"layer_plan": layers})
    tokens, targets = random_batch(config, 1, length, plan.device)
    model = our_model(config, plan.device, torch.bfloat16)
    exact = our_model(config, plan.device, torch.float32)
    for parameter, rounded in zip(exact.parameters(), model.parameters(), strict=True):
        parameter.data.copy_(rounded.data)
    truth, peer = (peer_model(each, length, "sdpa") for each in (exact, model))
    losses = {
        "ours": our_loss(model, tokens, targets),
        "theirs": peer_loss(peer, tokens),
        "truth": peer_loss(truth, tokens),
    }
    for loss in losses.values():
        loss.backward()
    mine = gradient_errors(model, truth)
    named = dict(truth.named_parameters())
    theirs = {
        name: ((p.grad.double() - named[name].grad.double()).norm() / named[name].grad.norm())
        for name, p in peer.named_parameters()
    }
    result = {
        "loss_error": abs(float(losses["ours"] / losses["truth"]) - 1),
        "their_loss_error": abs(float(losses["theirs"] / losses["truth"]) - 1),
        "gradient_error": statistics.fmean(mine.values()),
        "their_gradient_error": statistics.fmean(float(value) for value in theirs.values()),
    }
    print(
        f"gate, bf16 against Cohere2 in fp32: loss off by {result['loss_error']:.1e} (theirs "
        f"{result['their_loss_error']:.1e}), gradients by {result['gradient_error']:.2e} (theirs "
        f"{result['their_gradient_error']:.2e})",
        flush=True,
    )
    # The loss of a mean over thousands of tokens can be right by luck: a floor for theirs.
    if result["loss_error"] > 2 * max(result["their_loss_error"], 1e-4):
        sys.exit("Our loss is further off than twice theirs. The two do not compute the same.")
    if result["gradient_error"] > 2 * result["their_gradient_error"]:
        sys.exit("Our gradients are further off than twice theirs. They do not compute the same.")
    return result


def ours(plan: Plan, kind: str, config: ModelConfig, length: int, steps: int) -> None:
    """One row of our own model."""
    plan.part(f"{kind} at {length}", 20, lambda: one(plan, kind, config, length, steps))


def one(plan: Plan, kind: str, config: ModelConfig, length: int, steps: int) -> None:
    """Warm-up, then timed steps: as many as asked for, fewer if the time would run out."""
    tokens, targets = plan.batch(config, length)
    model, policies = build(plan, config, length, tokens.numel())
    if plan.options.compile or kind.endswith("compiled"):
        for block in model.blocks:
            block.compile()
    step = our_step(model, tokens, targets)
    for _ in range(2):
        step()
    once, _ = timed(step, plan.device)
    affordable = int((plan.left() - 60) / max(once, 1e-6))
    walls = [timed(step, plan.device)[0] for _ in range(max(3, min(steps, affordable)))]
    keep(plan, kind, config, length, tokens.numel(), walls, recompute=tally(policies))


def build(
    plan: Plan, config: ModelConfig, length: int, tokens: int
) -> tuple[Transformer, list[str]]:
    """Our model in bf16 under the cheapest recompute policy that fits the card."""
    policies = recompute.solve(config, tokens, MEMORY_SHARE * plan.memory, length)
    return our_model(config, plan.device, torch.bfloat16, policies), policies


def tally(policies: list[str]) -> str:
    """'selective 13, full 3'."""
    return ", ".join(f"{name} {policies.count(name)}" for name in dict.fromkeys(policies))


def keep(
    plan: Plan,
    kind: str,
    config: ModelConfig,
    length: int,
    tokens: int,
    walls: list[float],
    **more: Any,
) -> None:
    """Add a row: speed, causal MFU by the exact pairs of the mask, memory."""
    speed = tokens / statistics.median(walls)
    flops = flops_per_token(config, length)
    plan.rows.append(
        {
            "kind": kind,
            "length": length,
            "tokens_per_step": tokens,
            "steps": len(walls),
            "tokens_per_second": speed,
            "mfu_989": speed * flops / PEAK,
            "mfu_790": speed * flops / REACHABLE,
            "peak_gib": plan.peak_gib(),
            "walls": walls,
            **more,
        }
    )


def against(plan: Plan, name: str, length: int) -> None:
    """Cohere2 in one setting and ours, in turns; the setting yields until it fits in memory."""
    attention, *flags = name.split("+")
    config = hybrid(plan.options.shape)
    tokens, targets = plan.batch(config, length)
    rows = tokens.shape[0]
    for micro_rows, checkpointing in dict.fromkeys([(rows, False), (1, False), (1, True)]):
        step = peer_of(plan, config, attention, flags, tokens, micro_rows, checkpointing)
        if fits(lambda step=step: [step(), step()]):
            break
        del step
        plan.free()
    else:
        plan.note(
            f"transformers {name} at {length}: out of memory, one row at a time and with "
            "recomputation"
        )
        return
    once, _ = timed(step, plan.device)
    setting = f"{micro_rows} rows at a time{', recomputation' if checkpointing else ''}"
    peak = plan.peak_gib()
    model, policies = build(plan, config, length, tokens.numel())
    mine = our_step(model, tokens, targets)
    rounds = max(2, min(8, int(0.25 * plan.left() / (2 * once))))
    if not fits(lambda: [mine(), step()]):
        # Both do not fit beside each other: the peer's own steps stand alone.
        del model, mine
        plan.free()
        walls = [timed(step, plan.device)[0] for _ in range(rounds)]
        keep(plan, f"transformers {name}", config, length, tokens.numel(), walls, setting=setting)
        return
    times = in_turns([mine, step], plan.device, rounds, warm_up=1)
    ratio = statistics.median(times[1].wall) / statistics.median(times[0].wall)
    keep(
        plan,
        f"transformers {name}",
        config,
        length,
        tokens.numel(),
        times[1].wall,
        setting=setting,
        ours_is=ratio,
        ours_walls=times[0].wall,
        recompute=tally(policies),
    )
    plan.rows[-1]["peak_gib"] = peak


def fits(run: Callable[[], Any]) -> bool:
    """Whether `run` stays within the card's memory. Its frames are gone on return, so that what
    they held can be freed."""
    try:
        run()
    except torch.OutOfMemoryError:
        return False
    return True


def peer_of(
    plan: Plan,
    config: ModelConfig,
    attention: str,
    flags: list[str],
    tokens: torch.Tensor,
    micro_rows: int,
    checkpointing: bool,
) -> Step:
    """The step of Cohere2 with our weights."""
    small = our_model(config, plan.device, torch.bfloat16)
    chunked = "chunked" in flags
    peer = peer_model(
        small,
        tokens.shape[1],
        attention,
        compiled="compile" in flags,
        checkpointing=checkpointing,
        loss_apart=chunked,
    )
    head = lent_head(peer, small) if chunked else None
    return peer_step(peer, tokens, micro_rows, head)


def through_engine(plan: Plan, length: int) -> None:
    """The step of `megahybrid train`: DeepSpeed, ZeRO 1, fp32 accumulation."""
    config = hybrid(plan.options.shape)
    tokens, targets = plan.batch(config, length)
    model, policies = build(plan, config, length, tokens.numel())
    initialise_distributed("cpu" if plan.options.rehearse else "cuda")
    try:
        step = engine_step(model, tokens, targets, "bf16")
        for _ in range(3):
            step()
        synchronise(plan.device)
        walls = [timed(step, plan.device)[0] for _ in range(10)]
        kind = "hybrid through DeepSpeed"
        keep(plan, kind, config, length, tokens.numel(), walls, recompute=tally(policies))
    finally:
        shutdown_distributed(ok=True)


def kernel_rows(plan: Plan) -> list[dict[str, Any]]:
    """The kernels alone at the two shorter lengths."""
    dtype = torch.float32 if plan.options.rehearse else torch.bfloat16
    return [
        row
        for length in plan.options.lengths[:2]
        for row in kernels.measure(plan.options.shape, length, plan.device, dtype)
    ]


def summary(plan: Plan) -> str:
    """The short table, hybrid over full against the ideal, goals, notes."""
    lines = [
        "| length | step of | tokens/s | causal MFU of 989 (790) | GiB | steps | ours is | how |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(plan.rows, key=lambda row: row["length"]):
        ratio = f"{row['ours_is']:.2f} ×" if "ours_is" in row else ""
        how = row.get("setting") or row.get("recompute", "")
        lines.append(
            f"| {row['length']} | {row['kind']} | {row['tokens_per_second']:.0f} "
            f"| {row['mfu_989']:.1%} ({row['mfu_790']:.1%}) | {row['peak_gib']:.0f} "
            f"| {row['steps']} | {ratio} | {how} |"
        )
    speeds = {(row["kind"], row["length"]): row["tokens_per_second"] for row in plan.rows}
    config = hybrid(plan.options.shape)
    assert full_attention(config.layer_plan) == full(plan.options.shape).layer_plan
    for length in plan.options.lengths:
        if ("hybrid", length) not in speeds:
            continue
        if ("full", length) in speeds:
            ratio = speeds["hybrid", length] / speeds["full", length]
            ideal = ideal_speedup(config, length)
            lines.append(
                f"{length}: hybrid over full {ratio:.3f}, ideal {ideal:.3f} ({ratio / ideal:.0%})"
            )
        if length in GOAL and plan.options.shape == "1b":
            mfu = speeds["hybrid", length] * flops_per_token(config, length) / PEAK
            lines.append(
                f"{length}: MFU {mfu:.1%} (must {MUST[length]:.0%}, goal {GOAL[length]:.0%})"
            )
    return "\n".join(lines + plan.notes)
