"""`megahybrid train`: check in the parent, start the ranks, end with the first failure's code."""

import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megahybrid.config import RunConfig, check_run, load
from megahybrid.config.old_words import Tell, current_overrides, silent, tell_once
from megahybrid.errors import (
    EXIT_DONE,
    EXIT_USER_MISTAKE,
    ConfigError,
    MegahybridError,
    first_line,
    from_os_error,
    tell,
)
from megahybrid.heartbeat import LOGS, Heartbeat, write_stacks_on_signal
from megahybrid.parallel.rendezvous import LAUNCHER, Rendezvous, find_rendezvous
from megahybrid.run_folder import refuse_foreign_run_folder

EXIT_FAILURE = 1


def train(
    run_file: Path,
    overrides: Sequence[str],
    processes: int | None,
    allow: Sequence[str] = (),
    max_restarts: int = 0,
    tables: bool = False,
) -> int:
    """Train as one rank if a launcher started us, else start `processes` ranks here and wait.

    `allow` names fields that may differ from those the run began with; `max_restarts` is how often
    ranks that failed or hang are started again; `tables` makes tables and pictures for wandb.
    """
    told = _teller(os.environ)
    run = load(run_file, overrides, tell=told)
    allow = current_overrides(allow, told)
    directory = run.run_directory(run_file)
    refuse_foreign_run_folder(directory)
    place = find_rendezvous(os.environ)
    if place is not None:
        if processes not in (None, place.world_size):
            raise ConfigError(
                f"--processes={processes} starts ranks on this machine, but {place.source} has "
                f"started {place.world_size} already. Leave --processes out."
            )
        return _rank(run, directory, place, allow, tables)
    if max_restarts < 0:
        raise ConfigError(f"--max-restarts={max_restarts} is no number of restarts. Use 0 or more.")
    if processes is not None and processes < 1:
        raise ConfigError(f"--processes={processes} starts no rank. Use 1 or more.")
    processes = processes or _default_processes(run)
    check_run(run, processes)
    from megahybrid.checkpoint.directory import RunLock
    from megahybrid.train.preflight import check_inputs

    check_inputs(run, directory, allow)
    RunLock(directory).check_free()
    _make_directory(directory)
    from megahybrid.commands.local_restarts import forget_requests, train_local

    if processes == 1 and not max_restarts:
        forget_requests(directory)
        return _rank(run, directory, None, allow, tables)
    named = [word for name in allow for word in ("--allow", name)]
    command = ["-m", "megahybrid", "train", str(run_file), *overrides, *named]
    return train_local(command, processes, directory, max_restarts)


def _teller(environment: Mapping[str, str]) -> Tell:
    """Return where lines about old words go: said once, not by each rank, and not again by ranks
    that `train` has started."""
    rank = environment.get("RANK", environment.get("SLURM_PROCID", "0"))
    return silent if LAUNCHER in environment or rank != "0" else tell_once


def _make_directory(directory: Path) -> None:
    """The run's folder, before any rank needs it."""
    try:
        (directory / "logs").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigError(
            f"directory={directory} cannot be written to ({error.strerror}). "
            "Name a folder that can be, or free space there."
        ).because(error) from None


def _default_processes(run: RunConfig) -> int:
    """One rank per GPU; on a machine without, as many as one data rank needs."""
    if run.device != "cpu":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.device_count()
    return run.parallel.model_ranks


def _rank(
    run: RunConfig, directory: Path, place: Rendezvous | None, allow: Sequence[str], tables: bool
) -> int:
    """One rank from rendezvous to the end; every failure is told in one line, last of all."""
    from megahybrid.parallel.local_launch import (
        end_with_launcher,
        lost_peer,
        record_failure,
        started_by_launcher,
    )
    from megahybrid.parallel.mesh import shutdown_distributed

    launched = started_by_launcher()
    if launched:
        end_with_launcher()
    rank = place.rank if place else 0
    logs = _logs(directory)
    heartbeat = Heartbeat(directory, rank)
    if place is not None:
        with contextlib.suppress(OSError):
            write_stacks_on_signal(logs / f"stacks-{rank:04d}.txt")
    # Ranks other than 0 write to files; what ends one of them belongs on the terminal.
    terminal = os.fdopen(os.dup(2), "w") if rank else sys.stderr
    consequence = False
    try:
        heartbeat.start()
        code, message = _attempt(run, directory, allow, heartbeat, tables), _stopped(directory)
        shutdown_distributed(ok=True)
        if code == EXIT_DONE:
            heartbeat.end(code)
            return code
    except Exception as error:
        message, code = _explain(error, run, rank, place.world_size if place else 1, directory)
        consequence = lost_peer(message)
        if code == EXIT_FAILURE:
            _keep_traceback(logs, rank, show=not consequence)
        elif rank and not launched:
            message = f"rank {rank}: {message}"
    heartbeat.end(code, message, consequence=consequence)
    if launched:
        record_failure(logs, rank, message, consequence=consequence)
    else:
        with contextlib.suppress(OSError):  # the terminal may be a file on the disk that is full
            tell(message, terminal)
    if place is None:
        shutdown_distributed(ok=False)
        _flush()
        return code
    _flush()
    # Peers may wait in a collective for ever; leaving without teardown closes our connections,
    # which is how they learn of it.
    os._exit(code)


def _flush() -> None:
    """Write out what was printed; a full disk under it must not change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            # The interpreter flushes once more as it ends, and would end with 120.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _logs(directory: Path) -> Path:
    """Return the folder of this attempt's logs: our batch job has one for each."""
    return Path(os.environ.get(LOGS) or directory / "logs")


def _attempt(
    run: RunConfig, directory: Path, allow: Sequence[str], heartbeat: Heartbeat, tables: bool
) -> int:
    from megahybrid.parallel.allocator import expandable_segments
    from megahybrid.parallel.mesh import ParallelMesh, initialise_distributed
    from megahybrid.train.run import run_attempt
    from megahybrid.train.stop import StopRequest

    stop = StopRequest(directory)
    stop.install()
    expandable_segments()
    _limit_threads()
    world = initialise_distributed(run.device)
    check_run(run, world.world_size)
    if LOGS not in os.environ:  # under Slurm every rank's output is a file of its own already
        _open_log(directory / "logs", world.rank)
    mesh = ParallelMesh.from_world(
        tensor=run.parallel.tensor, context=run.parallel.context_degrees, device=world.device
    )
    return run_attempt(
        run, directory, mesh, lambda: _listeners(run, directory, tables), stop, heartbeat, allow
    )


def _explain(
    error: Exception, run: RunConfig, rank: int, world_size: int, directory: Path
) -> tuple[str, int]:
    """Return what ended a rank in one line, and the exit code for it."""
    if isinstance(error, MegahybridError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        if error.filename is None:
            error.filename = str(directory)
        if (known := from_os_error(error)) is not None:
            return str(known), known.exit_code
    from megahybrid.train.out_of_memory import explain_out_of_memory, is_out_of_memory

    if is_out_of_memory(error):
        # Another attempt would meet the same step.
        return explain_out_of_memory(run, rank, world_size), EXIT_USER_MISTAKE
    name = type(error).__name__
    where = _logs(directory) / f"rank-{rank:04d}.log"
    return f"rank {rank}: {name}: {first_line(error)} (traceback in {where})", EXIT_FAILURE


def _keep_traceback(logs: Path, rank: int, *, show: bool) -> None:
    """The exception being handled, into the rank's log; with `show` on the terminal as well."""
    if show and rank == 0:
        traceback.print_exc()
    with contextlib.suppress(OSError), open(logs / f"rank-{rank:04d}.log", "a") as log:
        traceback.print_exc(file=log)


def _stopped(directory: Path) -> str:
    return f"run {directory} stopped early and saved; the same command goes on with it."


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


def _track(directory: Path, suite: str | None, step: int) -> Any:
    """Tables and pictures for wandb: training knows nothing of the report, which draws them."""
    from megahybrid.report.tracker_page import tracked

    return tracked(directory, suite, step)


def _listeners(run: RunConfig, directory: Path, tables: bool) -> Any:
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
    listeners: list[Any] = [LedgerListener(directory), Console(cost_per_token=cost)]
    if LOGS not in os.environ:
        log = open(directory / "logs" / "rank-0000.log", "a", buffering=1)  # noqa: SIM115 (held for the run)
        listeners.append(Console(RichConsole(file=log, width=160), cost_per_token=cost))
    if run.log.wandb != "off":
        track = _track if tables else None
        listeners.append(WandbListener(run.log.wandb, run.log.wandb_project, track=track))
    if run.log.tensorboard:
        listeners.append(TensorBoardListener())
    return Listeners(listeners)
