"""Our own rows of the plan for one GPU, and the settings they are measured with."""

import random
import statistics
from typing import Any

from benchmarks import recompute
from benchmarks.plan import Plan, fits
from benchmarks.shapes import hybrid
from benchmarks.steps import Step, engine_step, our_model, our_step
from benchmarks.timing import synchronise, timed
from megahybrid.config.counting import flops_per_token, training_flops
from megahybrid.config.model import ModelConfig
from megahybrid.model.kernels import Documents
from megahybrid.model.kernels.choice import Workload, candidates, fastest
from megahybrid.model.transformer import Transformer
from megahybrid.train.kernels import measure_tested

PEAK, REACHABLE = 989e12, 790e12  # the data sheet's dense bf16, and what large products reach
# Of the card, for the policy: the rest is fragments and work space. Less where it did not fit.
MEMORY_SHARES = (0.86, 0.74, 0.6, 0.4)


def pick(plan: Plan, length: int) -> list[dict[str, Any]]:
    """The fastest attention kernel of each kind at this length, among those that pass their
    self-test: what a run chooses at its start."""
    config = hybrid(plan.options.shape)
    schemes = config.layer_plan.schemes
    work = Workload(
        plan.rows_of(length),
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


def packed(plan: Plan, config: ModelConfig, length: int, steps: int) -> None:
    """Rows of many documents of log-normal lengths, as a corpus has them."""
    tokens, targets = plan.batch(config, length)
    lengths = [document_lengths(length, seed) for seed in range(len(tokens))]
    starts = Documents.from_lengths(lengths).starts
    model = our_model(config, plan.device, plan.dtype)
    step = our_step(model, tokens, targets, starts=starts)
    walls = steady(plan, step, 2, steps)
    flops = training_flops(config, [n for row in lengths for n in row]) / tokens.numel()
    keep(plan, "hybrid, packed documents", config, length, tokens.numel(), walls, flops=flops)


def document_lengths(length: int, seed: int) -> list[int]:
    """Documents that fill a row: log-normal with a mean near 800 tokens; the last is cut."""
    draw, found = random.Random(seed), []
    while sum(found) < length:
        found.append(max(1, min(int(draw.lognormvariate(6.0, 1.2)), length - sum(found))))
    return found


def through_engine(plan: Plan, length: int) -> None:
    """The step of `megahybrid train`: DeepSpeed, ZeRO 1, fp32 accumulation."""
    config = hybrid(plan.options.shape)
    tokens, targets = plan.batch(config, length)
    model, policies = build(plan, config, length, tokens.numel())
    step = engine_step(model, tokens, targets, "bf16")
    walls = steady(plan, step, 3, 10)
    kind = "hybrid through DeepSpeed"
    keep(plan, kind, config, length, tokens.numel(), walls, recompute=tally(policies))


def offloaded(plan: Plan, length: int) -> None:
    """The 8B shape through the engine on one card, AdamW's moments in host memory: 10 bytes a
    parameter instead of 18. Rows one at a time, gradients summed in fp32."""
    config = hybrid("tiny" if plan.options.rehearse else "8b")
    tokens, targets = plan.batch(config, length)
    budget = MEMORY_SHARES[0] * plan.memory
    policies = recompute.solve(config, length, budget, length, "moments")
    model = made(plan, config, length, policies)
    expected = recompute.expected_bytes(config, policies, length, "moments") / 2**30
    step = engine_step(model, tokens, targets, "bf16", 1, "moments")
    walls = steady(plan, step, 1, 4)
    setting = f"moments on the host, {tally(policies)}; {expected:.0f} GiB by the formulas"
    kind = "hybrid, 8B, off-loaded"
    keep(plan, kind, config, length, tokens.numel(), walls, setting=setting, expected_gib=expected)


def steady(plan: Plan, step: Step, warm_up: int, steps: int) -> list[float]:
    """Wall seconds of `steps` steps after `warm_up` ones."""
    for _ in range(warm_up):
        step()
    synchronise(plan.device)
    return [timed(step, plan.device)[0] for _ in range(steps)]


def build(
    plan: Plan, config: ModelConfig, length: int, tokens: int, share: float = MEMORY_SHARES[0]
) -> tuple[Transformer, list[str]]:
    """Our model under the cheapest recompute policy that fits a share of the card, on the kernels
    that were measured at this length."""
    policies = recompute.solve(config, tokens, share * plan.memory, length)
    return made(plan, config, length, policies), policies


def made(plan: Plan, config: ModelConfig, length: int, policies: list[str]) -> Transformer:
    """Our model on the kernels of this length, with plain or compiled blocks as was chosen."""
    kernels = plan.kernels_of_layers(config, length)
    model = our_model(config, plan.device, plan.dtype, policies, kernels)
    if plan.compiled:
        model.compile_blocks("aot_eager" if plan.options.rehearse else "inductor")
    return model


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
