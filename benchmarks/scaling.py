"""How time grows with length, what two tensor ranks cost, and what memory the formulas foretell.

    python -m benchmarks.scaling [--parts products growth tensor memory]

On a CPU, in CPU-seconds. `products`: matrix products by each routine, and in bf16. `growth`:
seconds of a step of one row from 2k to 32k tokens, hybrid and full, against the FLOPs. `tensor`:
the same total work by two gloo ranks. `memory`: peak resident memory of a process with and without
recomputation and with and without the chunked loss, against config/memory.py; each figure is the
difference of two processes.
"""

import argparse
import sys
import time
from typing import Any

import torch

from benchmarks import memory_growth, products, two_ranks
from benchmarks.machine import heading, machine, write
from benchmarks.shapes import SHAPES, full, hybrid, random_batch
from benchmarks.steps import our_model, our_step
from benchmarks.timing import in_turns
from megahybrid.config.counting import flops_per_token, ideal_speedup

PARTS = ("products", "growth", "tensor", "memory")


def main(arguments: list[str] | None = None) -> int:
    """Prints one table per part."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shape", choices=SHAPES, default="growth")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    facts = machine(torch.device("cpu"))
    print(heading(facts), flush=True)
    # A file for each part: one may be measured again without the others.
    if "products" in options.parts:
        sizes = products.measure()
        print(products.table(sizes), flush=True)
        print(f"all figures: {write('products_cpu', {'machine': facts, 'products': sizes})}")
    if "growth" in options.parts:
        rows = growth(options.shape, options.lengths, options.rounds)
        print(growth_table(options.shape, rows), flush=True)
        print(f"all figures: {write('growth_cpu', {'machine': facts, 'growth': rows})}")
    if "tensor" in options.parts:
        ranks = two_ranks.measure("25m", 2048, options.rounds)
        print(two_ranks.table(ranks), flush=True)
        print(f"all figures: {write('two_ranks_cpu', {'machine': facts, 'tensor': ranks})}")
    if "memory" in options.parts:
        memory = memory_growth.measure()
        print(memory_growth.table(memory), flush=True)
        print(f"all figures: {write('memory_cpu', {'machine': facts, 'memory': memory})}")
    return 0


def growth(shape: str, lengths: list[int], rounds: int) -> list[dict[str, Any]]:
    """CPU-seconds of one step of one row at each length, hybrid and full in turns."""
    device, rows = torch.device("cpu"), []
    configs = {"hybrid": hybrid(shape), "full": full(shape)}
    for length in lengths:
        started = time.monotonic()
        steps = []
        for config in configs.values():
            tokens, targets = random_batch(config, 1, length, device)
            steps.append(our_step(our_model(config, device, torch.float32), tokens, targets))
        times = in_turns(steps, device, 1 if length > 8192 else rounds, int(length <= 8192))
        row: dict[str, Any] = {
            "length": length,
            "ideal": ideal_speedup(configs["hybrid"], length),
            "wall_seconds": time.monotonic() - started,
        }
        for (kind, config), value in zip(configs.items(), times, strict=True):
            row[kind] = value.as_json()
            row[f"{kind}_gflops"] = (
                length * flops_per_token(config, length) / value.as_json()["cpu_median"] / 1e9
            )
        row["ratio"] = row["full"]["cpu_median"] / row["hybrid"]["cpu_median"]
        rows.append(row)
    return rows


def growth_table(shape: str, rows: list[dict[str, Any]]) -> str:
    """CPU-seconds per step, and the hybrid's gain beside what the FLOPs alone would give."""
    lines = [
        f"| {shape}, one row of | hybrid CPU-s | full CPU-s | hybrid over full | ideal | of ideal "
        "| hybrid GFLOP/s | full GFLOP/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['length']} | {row['hybrid']['cpu_median']:.2f} "
            f"| {row['full']['cpu_median']:.2f} | {row['ratio']:.2f} × | {row['ideal']:.2f} × "
            f"| {row['ratio'] / row['ideal']:.0%} | {row['hybrid_gflops']:.0f} "
            f"| {row['full_gflops']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
