"""Two gloo ranks of a tensor axis against one process on the same total work, in CPU-seconds."""

import multiprocessing
import socket
import statistics
import time
from typing import Any

import torch

from benchmarks.shapes import hybrid, random_batch
from benchmarks.steps import MasterAdamW, our_loss, our_model, our_step
from benchmarks.timing import in_turns
from megahybrid.config.training import OptimizerConfig
from megahybrid.model.init import initialise
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh, initialise_distributed, shutdown_distributed

RANKS = 2
SECONDS_TO_WAIT = 1800


def measure(shape: str, length: int, rounds: int) -> dict[str, Any]:
    """Median seconds of a step: of one process, and of the ranks together and by the clock."""
    config, device = hybrid(shape), torch.device("cpu")
    tokens, targets = random_batch(config, 1, length, device)
    step = our_step(our_model(config, device, torch.float32), tokens, targets)
    alone = in_turns([step], device, rounds)[0].as_json()
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    port = _free_port()
    workers = [
        context.Process(target=_rank, args=(rank, port, shape, length, rounds, queue))
        for rank in range(RANKS)
    ]
    for worker in workers:
        worker.start()
    try:
        ranks = [queue.get(timeout=SECONDS_TO_WAIT) for _ in workers]
    finally:
        for worker in workers:
            worker.join(10)
            if worker.is_alive():
                worker.terminate()
    together = [sum(step) for step in zip(*(cpu for cpu, _ in ranks), strict=True)]
    return {
        "shape": shape,
        "length": length,
        "alone": alone,
        "ranks_cpu": together,
        "ranks_cpu_median": statistics.median(together),
        "ranks_wall_median": statistics.median(ranks[0][1]),
        "overhead": statistics.median(together) / alone["cpu_median"],
    }


def _rank(rank: int, port: int, shape: str, length: int, rounds: int, queue: Any) -> None:
    torch.set_num_threads(1)
    place = {
        "RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    initialise_distributed("cpu", environment=place)
    config = hybrid(shape)
    mesh = ParallelMesh.from_world(tensor=RANKS)
    model = Transformer(config, mesh)
    initialise(model, 1, OptimizerConfig())
    tokens, targets = random_batch(config, 1, length, mesh.device)
    optimizer = MasterAdamW(model.parameters())
    cpu, wall = [], []
    for number in range(rounds + 1):
        began, began_cpu = time.perf_counter(), time.process_time()
        our_loss(model, tokens, targets).backward()
        optimizer.step()
        if number:
            cpu.append(time.process_time() - began_cpu)
            wall.append(time.perf_counter() - began)
    queue.put((cpu, wall))
    shutdown_distributed(ok=True)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def table(result: dict[str, Any]) -> str:
    """CPU-seconds of both ranks together over those of one process."""
    return "\n".join(
        [
            f"| {result['shape']}, one row of {result['length']} | CPU-s | wall s |",
            "|---|---|---|",
            f"| one process | {result['alone']['cpu_median']:.2f} "
            f"| {result['alone']['wall_median']:.2f} |",
            f"| two tensor ranks together | {result['ranks_cpu_median']:.2f} "
            f"| {result['ranks_wall_median']:.2f} |",
            f"| overhead | {result['overhead']:.2f} × | |",
        ]
    )
