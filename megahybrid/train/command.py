"""`megahybrid train`: check in the parent, start the ranks, end with the first failure's code."""

import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megahybrid.config import RunConfig, load
from megahybrid.errors import EXIT_DONE, ConfigError, MegahybridError

EXIT_FAILURE = 1
LAUNCHED = ("RANK", "SLURM_PROCID")  # set by torchrun, by srun and by our own launcher


def train(run_file: Path, overrides: Sequence[str], processes: int | None) -> int:
    """Train as one rank if a launcher started us, else start `processes` ranks here and wait."""
    run = load(run_file, overrides)
    directory = run.run_directory(run_file)
    if any(name in os.environ for name in LAUNCHED):
        return _rank(run, directory)
    if processes is not None and processes < 1:
        raise ConfigError(f"--processes={processes} starts no rank. Use 1 or more.")
    processes = processes or _default_processes(run)
    run.check(processes)
    from megahybrid.train.run import check_inputs

    check_inputs(run, directory)
    if processes == 1:
        return _rank(run, directory)
    from megahybrid.parallel.local_launch import launch_local

    command = ["-m", "megahybrid", "train", str(run_file), *overrides]
    started = time.perf_counter()
    failure = launch_local(command, processes, directory / "logs")
    if failure is None:
        print(f"Run {directory} is complete ({time.perf_counter() - started:.0f} s).")
        return EXIT_DONE
    print(f"megahybrid: {failure.message}", file=sys.stderr)
    return failure.exit_code


def _default_processes(run: RunConfig) -> int:
    """One rank per GPU; on a machine without, as many as one tensor group needs."""
    if run.device != "cpu":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.device_count()
    return run.parallel.tensor


def _rank(run: RunConfig, directory: Path) -> int:
    """One rank from rendezvous to the end; every failure is written down for the launcher."""
    from megahybrid.parallel.local_launch import end_with_parent, record_failure
    from megahybrid.parallel.mesh import (
        ParallelMesh,
        initialise_distributed,
        shutdown_distributed,
    )
    from megahybrid.train.run import run_attempt
    from megahybrid.train.stop import StopRequest

    local = "MEGAHYBRID_LOCAL_LAUNCH" in os.environ
    if local:
        end_with_parent()
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    logs = directory / "logs"
    _limit_threads()
    stop = StopRequest()
    stop.install()
    try:
        world = initialise_distributed(run.device)
        run.check(world.world_size)
        _open_log(logs, world.rank)
        mesh = ParallelMesh.from_world(tensor=run.parallel.tensor, device=world.device)
        code = run_attempt(run, directory, mesh, lambda: _listeners(run, directory), stop)
        shutdown_distributed(ok=True)
        if code != EXIT_DONE and local:
            record_failure(logs, rank, _stopped(directory), consequence=False)
        elif code != EXIT_DONE and rank == 0:
            print(_stopped(directory), file=sys.stderr)
        return code
    except MegahybridError as error:
        message, code = str(error), error.exit_code
        if not local:
            print(f"megahybrid: {message}", file=sys.stderr)
    except Exception as error:
        traceback.print_exc()
        first_line = (str(error).splitlines() or [""])[0]
        message = f"rank {rank}: {type(error).__name__}: {first_line}"
        code = EXIT_FAILURE
    record_failure(logs, rank, message, consequence=_lost_peer(message))
    sys.stdout.flush()
    sys.stderr.flush()
    # Peers may wait in a collective for ever; leaving without teardown closes our connections,
    # which is how they learn of it.
    os._exit(code) if "WORLD_SIZE" in os.environ else None
    return code


def _stopped(directory: Path) -> str:
    return f"run {directory} stopped early and saved; the same command goes on with it."


def _lost_peer(message: str) -> bool:
    """Whether an error only says that another rank is gone."""
    words = ("Connection closed by peer", "Connection reset", "Broken pipe", "recvValue failed")
    return any(word in message for word in (*words, "NCCL", "remote process exited"))


def _limit_threads() -> None:
    """OMP_NUM_THREADS, when a launcher set it, holds for torch's own pool too."""
    import torch

    threads = os.environ.get("OMP_NUM_THREADS")
    if threads and threads.isdigit() and int(threads) > 0:
        torch.set_num_threads(int(threads))


def _open_log(logs: Path, rank: int) -> None:
    """Ranks other than 0 write to a file of their own, appended to by each attempt."""
    logs.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        return
    descriptor = os.open(
        logs / f"rank-{rank:04d}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    os.close(descriptor)


def _listeners(run: RunConfig, directory: Path) -> Any:
    from rich.console import Console as RichConsole

    from megahybrid.config.counting import flops_per_token
    from megahybrid.train.listeners import (
        Console,
        LedgerListener,
        Listeners,
        TensorBoardListener,
        WandbListener,
    )

    cost = {
        stage.name: flops_per_token(run.model, max(stage.lengths), run.plan_at(i))
        for i, stage in enumerate(run.stages)
    }
    log = open(directory / "logs" / "rank-0000.log", "a", buffering=1)  # noqa: SIM115 (held for the run)
    listeners: list[Any] = [
        LedgerListener(directory),
        Console(cost_per_token=cost),
        Console(RichConsole(file=log, width=160), cost_per_token=cost),
    ]
    if run.log.wandb != "off":
        listeners.append(WandbListener(run.log.wandb, run.log.wandb_project))
    if run.log.tensorboard:
        listeners.append(TensorBoardListener())
    return Listeners(listeners)
