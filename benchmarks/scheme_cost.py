"""What parts of a recipe cost in a training step: each against the same model without, in turns.

A gate, a chunk (against a window of as many tokens), learned sinks, fused views, a z-loss. The
ratio is that of CPU-seconds of steps that follow each other, one of either: its median over pairs,
with the 95 % interval of that median by resampling.

    python -m benchmarks.scheme_cost [--shape 25m] [--length 2048] [--pairs 15] [--only gate]
"""

import argparse
import random
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.machine import heading, machine, write
from benchmarks.shapes import SHAPES, hybrid, random_batch
from benchmarks.steps import our_model, our_step
from benchmarks.timing import in_turns
from megahybrid.config.attention import AttentionScheme
from megahybrid.config.counting import flops_per_token
from megahybrid.config.model import ModelConfig
from megahybrid.config.parsing import parse

RESAMPLES = 2000

Change = Callable[[ModelConfig], ModelConfig]


def with_scheme(config: ModelConfig, of: str, **fields: Any) -> ModelConfig:
    """Return the model with other fields of one scheme, or of all where `of` is "all"."""
    plan = config.layer_plan
    schemes = {
        name: parse(AttentionScheme, scheme.model_dump(mode="json") | fields)
        if of in ("all", name)
        else scheme
        for name, scheme in plan.schemes.items()
    }
    return config.model_copy(update={"layer_plan": plan.model_copy(update={"schemes": schemes})})


def as_it_is(config: ModelConfig) -> ModelConfig:
    """Return the model that others are compared with."""
    return config


def chunked(config: ModelConfig) -> ModelConfig:
    """Return the model with chunks of as many tokens as its windows have."""
    local = config.layer_plan.schemes["local"]
    return with_scheme(config, "local", window=None, chunk=local.window)


def fused(config: ModelConfig, gate: str) -> ModelConfig:
    """Return the model whose full layers have a second, rotated view of the last 512 keys."""
    near = {"position": {"kind": "rope", "theta": 10000.0}, "window": 512}
    return with_scheme(config, "global", near=near, fuse={"gate": gate})


# By name: what is compared with what, and the most that it may cost; None where no limit was set,
# "flops" for one and a half times its share of the step's products.
CASES: dict[str, tuple[Change, Change, float | str | None]] = {
    "gate: head": (as_it_is, lambda config: with_scheme(config, "all", gate="head"), 1.02),
    "gate: element": (as_it_is, lambda config: with_scheme(config, "all", gate="element"), "flops"),
    "chunk": (as_it_is, chunked, 1.0),
    "sink": (as_it_is, lambda config: with_scheme(config, "all", sink=True), None),
    "fuse: head": (as_it_is, lambda config: fused(config, "head"), 1.10),
    "fuse: token": (as_it_is, lambda config: fused(config, "token"), 1.10),
    "z_loss": (as_it_is, as_it_is, 1.02),  # of the loss alone: measure() sets it
}


def limit_of(limit: float | str | None, without: ModelConfig, of: ModelConfig, length: int) -> Any:
    """Return the limit as a ratio."""
    if limit != "flops":
        return limit
    share = flops_per_token(of, length) / flops_per_token(without, length)
    return 1 + 1.5 * (share - 1)


def interval(ratios: list[float]) -> tuple[float, float]:
    """The 95 % interval of the median, by resampling with a fixed seed."""
    drawn = random.Random(1)
    medians = sorted(
        statistics.median(drawn.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES)
    )
    return medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Steps of the model without and with it, in turns."""
    before, after, limit = CASES[name]
    base = hybrid(options.shape)
    configs = before(base), after(base)
    device = torch.device("cpu")
    tokens, targets = random_batch(base, 1, options.length, device)
    models = [our_model(config, device, torch.float32) for config in configs]
    models[1].head.z_loss = 1e-5 if name == "z_loss" else 0.0
    steps = [our_step(model, tokens, targets) for model in models]
    without, with_it = in_turns(steps, device, options.pairs)
    ratios = [b / a for a, b in zip(without.cpu, with_it.cpu, strict=True)]
    low, high = interval(ratios)
    return {
        "case": name,
        "ratio": statistics.median(ratios),
        "interval": [low, high],
        "limit": limit_of(limit, *configs, options.length),
        "without": without.as_json(),
        "with": with_it.as_json(),
    }


def table(results: list[dict[str, Any]]) -> str:
    """One line a case."""
    lines = [
        "| part | CPU-seconds, with / without | 95 % interval | at most |",
        "|---|---|---|---|",
    ]
    for found in results:
        low, high = found["interval"]
        limit = "" if found["limit"] is None else f"{found['limit']:.3f}"
        lines.append(f"| {found['case']} | {found['ratio']:.3f} | {low:.3f}–{high:.3f} | {limit} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure the cases asked for, print their table and keep every time."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="25m", choices=SHAPES)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument(
        "--only", nargs="*", default=[], help="words that a case's name begins with"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    facts = machine(torch.device("cpu"))
    print(heading(facts))
    chosen = [name for name in CASES if not options.only or name.startswith(tuple(options.only))]
    results = [measure(name, options) for name in chosen]
    path = write(
        "scheme_cost_cpu",
        {"machine": facts, "shape": options.shape, "length": options.length, "cases": results},
    )
    print(table(results))
    print(f"all times: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
