"""Context ranks against one process on the same rows: memory, CPU-seconds, bytes received.

    python -m benchmarks.context_ranks [--parts memory cpu] [--degrees 1 2 4]

On a CPU, over gloo, in the step that `megahybrid train` takes (DeepSpeed, ZeRO 1, fp32). `memory`:
by how much a step after the first raises the resident memory of a rank. `cpu`: CPU-seconds of the
steps after the second, all ranks together, in rounds in which the degrees take turns; what gloo's
own threads and the calls into it take is part of it and told apart. Both count what each rank
receives on the context axis, beside the formula.
"""

import argparse
import gc
import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.group_calls import GroupCalls, counted, threads_cpu
from benchmarks.machine import heading, machine, write
from benchmarks.shapes import SHAPES, hybrid, random_batch
from benchmarks.steps import Step, engine_step
from megahybrid.config.context import HeadShape, plan_context
from megahybrid.config.context_volume import received_bytes
from megahybrid.config.model import ModelConfig
from megahybrid.config.parallel import ParallelConfig
from megahybrid.config.training import OptimizerConfig
from megahybrid.model.init import initialise
from megahybrid.model.row_shards import ContextRanks
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh, initialise_distributed, shutdown_distributed

PARTS = ("memory", "cpu")
SECONDS_TO_WAIT = 3000
WIDTH = 4  # bytes of an fp32 value
GOALS = {"memory": {4: 0.30}, "cpu": {2: 1.15, 4: 1.25}}
# Every tensor a mapping of its own, returned when freed: the peak is that of live tensors.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def main(arguments: list[str] | None = None) -> int:
    """Print a table for each part, and write a file for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shape", choices=SHAPES, default="25m")
    parser.add_argument("--degrees", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--memory-length", type=int, default=16384)
    parser.add_argument("--cpu-length", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3, help="of the steps that are timed")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    facts = machine(torch.device("cpu"))
    print(heading(facts), flush=True)
    if "memory" in options.parts:
        rows = memory(options.shape, options.memory_length, options.degrees)
        print(memory_table(rows), flush=True)
        _write("context_memory_cpu", facts, options.shape, options.memory_length, rows)
    if "cpu" in options.parts:
        rows = cpu(options.shape, options.cpu_length, options.degrees, options.rounds)
        print(cpu_table(rows), flush=True)
        _write("context_cpu", facts, options.shape, options.cpu_length, rows)
    return 0


def _write(name: str, facts: dict[str, Any], shape: str, length: int, rows: list[Any]) -> None:
    result = {"machine": facts, "shape": shape, "length": length, "degrees": rows}
    print(f"all figures: {write(name, result)}", flush=True)


# ---- the ranks of one degree ----


def received_by_formula(config: ModelConfig, length: int, degree: int, rank: int) -> int:
    """Return the bytes of a step of one row for the attention of one rank."""
    parallel = ParallelConfig(context=degree)
    crossing = plan_context(config, parallel, config.layer_plan, length)
    total, shape = 0, HeadShape.of(config, 1)
    for name in config.layer_plan.names():
        exchange, window = crossing.exchange(name), config.layer_plan.schemes[name].window
        if exchange is not None:
            total += received_bytes(
                *(exchange, window, length, degree, shape),
                layout=crossing.layout,
                rank=rank,
                bytes_per_value=WIDTH,
            ).total()
    return total


def _rank(rank: int, world: tuple[int, int], shape: str, length: int, pipe: Any) -> None:
    """Take a step each time that `pipe` asks for one, and tell what it took."""
    degree, port = world
    torch.set_num_threads(1)
    place = {"RANK": str(rank), "WORLD_SIZE": str(degree), "LOCAL_RANK": str(rank)}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    initialise_distributed("cpu", environment=place)
    config = hybrid(shape)
    mesh = ParallelMesh.from_world(context=degree)
    parallel = ParallelConfig(context=degree)
    model = Transformer(config, mesh, context=ContextRanks(mesh, config, parallel))
    initialise(model, 1, OptimizerConfig())
    tokens, targets = random_batch(config, 1, length, mesh.device)
    step = engine_step(model, tokens, targets, "fp32", context=degree)
    with counted() as calls:
        while pipe.recv():
            pipe.send(
                _observed(step, calls, mesh, received_by_formula(config, length, degree, rank))
            )
    shutdown_distributed(ok=True)


def _observed(step: Step, calls: GroupCalls, mesh: ParallelMesh, foretold: int) -> dict[str, Any]:
    gc.collect()
    calls.clear()
    # The mark of the highest resident memory starts again at what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    level, threads = _status("VmRSS:"), threads_cpu()
    wall, used = time.perf_counter(), time.process_time()
    loss = step()
    wall, used = time.perf_counter() - wall, time.process_time() - used
    after = threads_cpu()
    by_thread = {name: after[name] - threads.get(name, 0.0) for name in after}
    return {
        "loss": loss,
        "level": level,
        "peak": _status("VmHWM:"),
        "cpu": used,
        "wall": wall,
        "cpu_in_calls": calls.cpu,
        "wall_in_calls": calls.wall,
        "cpu_of_gloo": sum(used for name, used in by_thread.items() if "gloo" in name),
        "received": calls.of(mesh.context.group) if mesh.context.size > 1 else 0,
        "received_by_formula": foretold,
    }


def _status(key: str) -> int:
    """Return a line of this process's status, in bytes: what is resident now, or was at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


class Group:
    """The processes of one degree, which take a step together when they are asked to."""

    def __init__(self, degree: int, shape: str, length: int) -> None:
        context = multiprocessing.get_context("spawn")
        world = (degree, _free_port())
        pairs = [context.Pipe() for _ in range(degree)]
        self.pipes = [ours for ours, _ in pairs]
        self.processes = [
            context.Process(target=_rank, args=(rank, world, shape, length, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in pairs:
            theirs.close()

    def step(self) -> list[dict[str, Any]]:
        """Return what a step took, by rank."""
        for pipe in self.pipes:
            pipe.send(True)
        found = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(SECONDS_TO_WAIT):
                raise TimeoutError(f"rank {rank} took no step within {SECONDS_TO_WAIT} s")
            found.append(pipe.recv())
        return found

    def close(self) -> None:
        """Let the ranks leave together; end those that do not."""
        for pipe in self.pipes:
            pipe.send(False)
        for process in self.processes:
            process.join(30)
            if process.is_alive():
                process.terminate()


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set what processes that are started meanwhile inherit."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# ---- memory ----


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


# ---- CPU-seconds ----


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
        alone = row["cpu"] - row["cpu_in_calls"] - row["cpu_of_gloo"]
        most = max(range(row["degree"]), key=lambda rank: row["received"][rank])
        cells = [
            f"{row['cpu']:.2f}",
            f"{row['cpu'] / rows[0]['cpu']:.2f} ×",
            "" if goal is None else f"{goal:.2f} ×",
            f"{row['cpu_in_calls']:.2f}",
            f"{row['cpu_of_gloo']:.2f}",
            f"{alone / rows[0]['cpu']:.2f} ×",
            f"{row['received'][most] / 1e6:.2f} MB",
            f"{row['received_by_formula'][most] / 1e6:.2f} MB",
        ]
        lines.append(f"| {row['degree']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
