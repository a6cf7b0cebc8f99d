"""The processes of one context degree, which take training steps of the same row together.

They take the step that `megahybrid train` takes: DeepSpeed, ZeRO 1, fp32, over gloo.
"""

import gc
import multiprocessing
import socket
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.group_calls import GroupCalls, counted, threads_cpu
from benchmarks.shapes import SHAPES, hybrid, random_batch
from benchmarks.steps import Step, engine_step
from megahybrid.config.context_plan import plan_context
from megahybrid.config.context_volume import received_bytes
from megahybrid.config.loader import load
from megahybrid.config.model import ModelConfig
from megahybrid.config.parallel import ParallelConfig
from megahybrid.config.training import OptimizerConfig
from megahybrid.model.init import initialise
from megahybrid.model.row_shards import ContextRanks
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh, initialise_distributed, shutdown_distributed

SECONDS_TO_WAIT = 3000
WIDTH = 4  # bytes of an fp32 value


class Group:
    """Processes that take a step when they are asked to. `shape` as `model_of` takes it."""

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


def model_of(shape: str) -> ModelConfig:
    """Return the model of a shape's name, or of a run file."""
    return hybrid(shape) if shape in SHAPES else load(Path(shape)).model


def received_by_formula(config: ModelConfig, length: int, degree: int, rank: int) -> int:
    """Return the bytes of a step of one row for the attention of one rank."""
    parallel = ParallelConfig(context=degree)
    crossing = plan_context(config, parallel, config.layer_plan, length)
    total = 0
    for name in config.layer_plan.names():
        for one, exchange in crossing.of(name):
            if exchange is not None:
                total += received_bytes(
                    *(exchange, one.window, length, degree, one.shapes[0]),
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
    config = model_of(shape)
    mesh = ParallelMesh.from_world(context=degree)
    parallel = ParallelConfig(context=degree)
    model = Transformer(config, mesh, context=ContextRanks(mesh, config, parallel))
    initialise(model, 1, OptimizerConfig())
    tokens, targets = random_batch(config, 1, length, mesh.device)
    step = engine_step(model, tokens, targets, "fp32", context=degree)
    foretold = received_by_formula(config, length, degree, rank)
    with counted() as calls:
        while pipe.recv():
            pipe.send(_observed(step, calls, mesh) | {"received_by_formula": foretold})
    shutdown_distributed(ok=True)


def _observed(step: Step, calls: GroupCalls, mesh: ParallelMesh) -> dict[str, Any]:
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
    }


def _status(key: str) -> int:
    """Return a line of this process's status, in bytes: what is resident now, or was at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
