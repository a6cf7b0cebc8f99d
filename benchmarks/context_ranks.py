"""Context ranks against one process on the same row: memory, CPU-seconds, bytes received.

    python -m benchmarks.context_ranks [--parts memory cpu] [--degrees 1 2 4]
    python -m benchmarks.context_ranks --parts memory --shape configs/runs/demo_long.yaml \
        --degrees 1 2 --memory-length 32768

On a CPU, in the step that `megahybrid train` takes. `memory`: by how much a step after the first
raises the resident memory of a rank. `cpu`: CPU-seconds of the steps after the second, all ranks
together, in rounds in which the degrees take turns; what gloo's own threads and the calls into it
take is part of it, and told apart. Both count what each rank receives on the context axis, beside
the formula.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.context_group import Group
from benchmarks.machine import heading, machine, write

PARTS = ("memory", "cpu")
GOALS = {"memory": {2: 0.55, 4: 0.30}, "cpu": {2: 1.15, 4: 1.25}}
# Every tensor a mapping of its own, returned when freed: the peak is that of live tensors.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def main(arguments: list[str] | None = None) -> int:
    """Print a table for each part, and write a file for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shape", default="25m", help="of benchmarks/shapes.py, or a run file")
    parser.add_argument("--degrees", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--memory-length", type=int, default=16384)
    parser.add_argument("--cpu-length", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3, help="of the steps that are timed")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    shape, facts = options.shape, machine(torch.device("cpu"))
    print(heading(facts), flush=True)
    for part in options.parts:
        if part == "memory":
            length = options.memory_length
            rows = memory(shape, length, options.degrees)
            print(memory_table(rows), flush=True)
        else:
            length = options.cpu_length
            rows = cpu(shape, length, options.degrees, options.rounds)
            print(cpu_table(rows), flush=True)
        result = {"machine": facts, "shape": shape, "length": length, "degrees": rows}
        print(f"all figures: {write(f'context_{part}_{Path(shape).stem}', result)}", flush=True)
    return 0


def memory(shape: str, length: int, degrees: list[int]) -> list[dict[str, Any]]:
    """Return what the second step adds to each rank's resident memory, by degree."""
    rows = []
    for degree in degrees:
        with _environment(EXACT):
            group = Group(degree, shape, length)
        group.step()  # the first, which makes the optimizer's states
        ranks = group.step()
        group.close()
        rows.append(
            {
                "degree": degree,
                "adds": max(rank["peak"] - rank["level"] for rank in ranks),
                "level": max(rank["level"] for rank in ranks),
                "peak": max(rank["peak"] for rank in ranks),
                "ranks": ranks,
            }
        )
    return rows


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set what processes that are started meanwhile inherit."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def memory_table(rows: list[dict[str, Any]]) -> str:
    """What the fullest rank of each degree has."""
    lines = [
        "| context ranks | after the first update | peak of a step | the step adds "
        "| of one process | goal |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        goal = GOALS["memory"].get(row["degree"])
        cells = [f"{row[key] / 2**20:,.0f} MiB" for key in ("level", "peak", "adds")]
        cells += [f"{row['adds'] / rows[0]['adds']:.2f}", "" if goal is None else f"{goal:.2f}"]
        lines.append(f"| {row['degree']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cpu(shape: str, length: int, degrees: list[int], rounds: int) -> list[dict[str, Any]]:
    """Return the CPU-seconds of steps by degree, all ranks together; the degrees take turns."""
    groups = {degree: Group(degree, shape, length) for degree in degrees}
    steps: dict[int, list[list[dict[str, Any]]]] = {degree: [] for degree in degrees}
    try:
        for number in range(rounds + 2):
            order = degrees if number % 2 == 0 else degrees[::-1]
            for degree in order:
                taken = groups[degree].step()
                if number >= 2:
                    steps[degree].append(taken)
    finally:
        for group in groups.values():
            group.close()
    return [_cpu_row(degree, steps[degree]) for degree in degrees]


def _cpu_row(degree: int, steps: list[list[dict[str, Any]]]) -> dict[str, Any]:
    def median(key: str) -> float:
        return statistics.median(sum(rank[key] for rank in step) for step in steps)

    last = steps[-1]
    return {
        "degree": degree,
        "loss": last[0]["loss"],
        **{key: median(key) for key in ("cpu", "cpu_in_calls", "cpu_of_gloo")},
        "wall": statistics.median(max(rank["wall"] for rank in step) for step in steps),
        "received": [rank["received"] for rank in last],
        "received_by_formula": [rank["received_by_formula"] for rank in last],
        "steps": steps,
    }


def cpu_table(rows: list[dict[str, Any]]) -> str:
    """All ranks of each degree together, against the first."""
    lines = [
        "| context ranks | CPU-s a step | of one process | goal | of these in calls | in gloo's "
        "threads | without both | received by a rank | by formula |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        goal = GOALS["cpu"].get(row["degree"])
        most = max(range(row["degree"]), key=lambda rank: row["received"][rank])
        cells = [
            f"{row['cpu']:.2f}",
            f"{row['cpu'] / rows[0]['cpu']:.2f} ×",
            "" if goal is None else f"{goal:.2f} ×",
            f"{row['cpu_in_calls']:.2f}",
            f"{row['cpu_of_gloo']:.2f}",
            f"{_own(row) / _own(rows[0]):.2f} ×",
            f"{row['received'][most] / 1e6:.2f} MB",
            f"{row['received_by_formula'][most] / 1e6:.2f} MB",
        ]
        lines.append(f"| {row['degree']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _own(row: dict[str, Any]) -> float:
    """CPU-seconds of what is not communication."""
    return row["cpu"] - row["cpu_in_calls"] - row["cpu_of_gloo"]


if __name__ == "__main__":
    sys.exit(main())
