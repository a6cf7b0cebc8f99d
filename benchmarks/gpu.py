"""The plan for one GPU: ours hybrid and full at each length, then Hugging Face's Cohere2 in turns
with ours, the engine, and the kernels alone. Made to finish within one call of nine minutes.

Parts come in the order of their worth. A part that fails is told and the plan goes on; a part for
which no time is left is told too. `--rehearse` runs all of it on the CPU with the tiny shape.
"""

import argparse
import random
import statistics
import sys
from typing import Any

import torch

from benchmarks import kernels, recompute
from benchmarks.gate import gate
from benchmarks.machine import heading, machine, write
from benchmarks.plan import Plan, fits
from benchmarks.shapes import full, hybrid
from benchmarks.steps import (
    Step,
    engine_step,
    lent_head,
    our_model,
    our_step,
    peer_model,
    peer_step,
)
from benchmarks.timing import in_turns, synchronise, timed
from megahybrid.config.counting import (
    flops_per_token,
    full_attention,
    ideal_speedup,
    training_flops,
)
from megahybrid.config.model import ModelConfig
from megahybrid.model.kernels import Documents
from megahybrid.model.kernels.choice import Workload, candidates, fastest
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.allocator import expandable_segments
from megahybrid.parallel.mesh import initialise_distributed, shutdown_distributed
from megahybrid.train.kernels import measure_tested

PEAK, REACHABLE = 989e12, 790e12  # the data sheet's dense bf16, and what large products reach
MUST, GOAL = {8192: 0.42, 32768: 0.38, 131072: 0.34}, {8192: 0.50, 32768: 0.47, 131072: 0.42}
# Of the card, for the policy: the rest is fragments and work space. Less where it did not fit.
MEMORY_SHARES = (0.86, 0.74, 0.6, 0.4)


def run_plan(options: argparse.Namespace) -> int:
    """Everything, then the table and the JSON. Exit code 1 where the gate does not hold."""
    if options.rehearse:
        options.shape, options.lengths = "tiny", [64, 128]
        options.peers = options.rehearsed_peers
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no CUDA device. Use --rehearse to try the plan on CPU.")
    expandable_segments()
    plan = Plan(options)
    facts = machine(plan.device)
    print(heading(facts), flush=True)
    held = gate(plan)
    plan.free()
    config, first = hybrid(options.shape), options.lengths[0]
    chosen = [
        row
        for length in options.lengths
        for row in plan.part(f"kernels at {length}", 15, lambda n=length: pick(plan, n)) or []
    ]
    ours(plan, "hybrid", config, first, options.steps)
    plan.compiled = True
    ours(plan, "hybrid, compiled", config, first, options.steps)
    prefer_faster_blocks(plan)
    for length in options.lengths[1:]:
        ours(plan, "hybrid", config, length, options.steps)
    for length in options.lengths:
        ours(plan, "full", full(options.shape), length, max(options.steps // 2, 5))
    for length in options.lengths:
        for name in options.peers:
            label = f"transformers {name} at {length}"
            plan.part(label, 40, lambda name=name, length=length: against(plan, name, length))
    longest = 2 * options.lengths[-1]
    ours(plan, "hybrid", config, longest, 3)
    plan.part("engine", 25, lambda: through_engine(plan, first))
    plan.part("packed documents", 20, lambda: packed(plan, config, first, 10))
    sequential = config.model_copy(update={"block": "pre_norm"})
    ours(plan, "hybrid, sequential block", sequential, first, 10)
    table = plan.part("kernels", 30, lambda: kernel_rows(plan)) or []
    path = write(
        "train_step_rehearsal" if options.rehearse else "train_step_cuda",
        {
            "machine": facts,
            "shape": options.shape,
            "gate": held,
            "rows": plan.rows,
            "kernels": table,
            "kernels_chosen": plan.kernels,
            "kernels_measured": chosen,
            "blocks_compiled": plan.compiled,
            "notes": plan.notes,
        },
    )
    if table:
        print(kernels.table(table))
    print(f"kernels chosen: {plan.kernels}; blocks {'compiled' if plan.compiled else 'plain'}")
    print(summary(plan))
    print(f"all times: {path}")
    return 0


def prefer_faster_blocks(plan: Plan) -> None:
    """Of the same step with plain and with compiled blocks the faster is ours from here on."""
    plain, compiled = (
        next((row for row in plan.rows if row["kind"] == kind), None)
        for kind in ("hybrid", "hybrid, compiled")
    )
    plan.compiled = bool(
        compiled and (plain is None or compiled["tokens_per_second"] > plain["tokens_per_second"])
    )
    if compiled and plan.compiled:
        compiled["kind"] = "hybrid"
        if plain:
            plain["kind"] = "hybrid, plain blocks"
    elif compiled:
        compiled["kind"] = "hybrid, compiled blocks"


def pick(plan: Plan, length: int) -> list[dict[str, Any]]:
    """The fastest attention kernel of each kind at this length, among those that pass their
    self-test: what a run chooses at its start."""
    config = hybrid(plan.options.shape)
    schemes = config.layer_plan.schemes
    rows = plan.rows_of(length)
    work = Workload(
        rows,
        length,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        plan.dtype,
        plan.device,
        documents=False,
    )
    told = []
    for kind in ("full", "windowed"):
        these = {n: s for n, s in schemes.items() if (s.window is None) == (kind == "full")}
        names = candidates(kind, plan.device, plan.dtype, config.head_dim)
        found = measure_tested(names, these, work)
        plan.kernels.setdefault(length, {})[kind] = fastest(found) or names[0]
        told.append({"length": length, "kind": kind, "seconds": found})
        words = ", ".join(
            f"{name} {value * 1e3:.1f} ms" if isinstance(value, float) else f"{name}: {value[:60]}"
            for name, value in found.items()
        )
        print(f"  {length} {kind}: {words}", flush=True)
    return told


def ours(plan: Plan, kind: str, config: ModelConfig, length: int, steps: int) -> None:
    """One row of our own model."""
    plan.part(f"{kind} at {length}", 20, lambda: one(plan, kind, config, length, steps))


def one(plan: Plan, kind: str, config: ModelConfig, length: int, steps: int) -> None:
    """Warm-up, then timed steps: as many as asked for, fewer if they would take over a minute."""
    tokens, targets = plan.batch(config, length)
    for share in MEMORY_SHARES:
        model, policies = build(plan, config, length, tokens.numel(), share)
        step = our_step(model, tokens, targets)
        if fits(lambda step=step: [step(), step()]):
            break
        plan.note(f"{kind} at {length}: {tally(policies)} did not fit")
        del model, step
        plan.free()
    else:
        return
    once, _ = timed(step, plan.device)
    affordable = int(min(60.0, plan.left() - 60) / max(once, 1e-6))
    walls = [timed(step, plan.device)[0] for _ in range(max(3, min(steps, affordable)))]
    keep(plan, kind, config, length, tokens.numel(), walls, recompute=tally(policies))


def packed(plan: Plan, config: ModelConfig, length: int, steps: int) -> None:
    """Rows of many documents of log-normal lengths, as a corpus has them."""
    tokens, targets = plan.batch(config, length)
    lengths = [document_lengths(length, seed) for seed in range(len(tokens))]
    starts = Documents.from_lengths(lengths).starts
    model = our_model(config, plan.device, plan.dtype)
    step = our_step(model, tokens, targets, starts=starts)
    for _ in range(2):
        step()
    walls = [timed(step, plan.device)[0] for _ in range(steps)]
    flops = training_flops(config, [n for row in lengths for n in row]) / tokens.numel()
    keep(plan, "hybrid, packed documents", config, length, tokens.numel(), walls, flops=flops)


def document_lengths(length: int, seed: int) -> list[int]:
    """Documents that fill a row: log-normal with a mean near 800 tokens; the last is cut."""
    draw, found = random.Random(seed), []
    while sum(found) < length:
        found.append(max(1, min(int(draw.lognormvariate(6.0, 1.2)), length - sum(found))))
    return found


def build(
    plan: Plan, config: ModelConfig, length: int, tokens: int, share: float = MEMORY_SHARES[0]
) -> tuple[Transformer, list[str]]:
    """Our model under the cheapest recompute policy that fits a share of the card, on the kernels
    that were measured at this length."""
    policies = recompute.solve(config, tokens, share * plan.memory, length)
    chosen = plan.kernels.get(length) or plan.kernels.get(plan.options.lengths[-1], {})
    kernels = [
        chosen.get("full" if scheme.window is None else "windowed", "auto")
        for scheme in config.layer_plan.expand()
    ]
    model = our_model(config, plan.device, plan.dtype, policies, kernels)
    if plan.compiled:
        model.compile_blocks("aot_eager" if plan.options.rehearse else "inductor")
    return model, policies


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
    flops = more.pop("flops", None) or flops_per_token(config, length)
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
