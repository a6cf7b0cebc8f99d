"""Commands that look at a trained model on several ranks: tensor ranks have their share of every
matrix, context ranks of every row.

All ranks work alike; rank 0 alone tells and writes. Ranks are started here, or by torchrun or srun.
"""

import math
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from megahybrid.errors import EXIT_DONE, ConfigError, MegahybridError, first_line, tell
from megahybrid.parallel.mesh import (
    ParallelMesh,
    choose_device,
    initialise_distributed,
    shutdown_distributed,
)
from megahybrid.parallel.rendezvous import Rendezvous, find_rendezvous
from megahybrid.train.out_of_memory import is_out_of_memory


def on_model_ranks(
    work: Callable[[ParallelMesh], int],
    tensor: int | None,
    context: int | None,
    device: str,
    command: Sequence[str],
) -> int:
    """Return what `work` does on a mesh of `tensor` × `context` ranks (both None: of this process
    alone).

    Where no launcher has started this process, `megahybrid *command` is started as so many ranks of
    this machine. Raises ConfigError where a launcher has started another number.
    """
    asked = {"--tensor": tensor, "--context": context}
    given = {name: ranks for name, ranks in asked.items() if ranks is not None}
    if not given:
        return _within_memory(work, ParallelMesh.single(choose_device(device, 0)))
    for name, ranks in given.items():
        if ranks < 1:
            raise ConfigError(f"{name}={ranks} is no number of ranks. Use 1 or more.")
    place = find_rendezvous(os.environ)
    ranks = math.prod(given.values())
    if place is None:
        return _start(command, ranks)
    if place.world_size != ranks:
        told = " times ".join(f"{name}={number}" for name, number in given.items())
        way_out = (
            f"Use {next(iter(given))}={place.world_size}"
            if len(given) == 1
            else (f"Use degrees of which the product is {place.world_size}")
        )
        raise ConfigError(
            f"{told} is not the number of ranks that {place.source} has started "
            f"({place.world_size}). {way_out}, or start {ranks}."
        )
    return _rank(work, place, device, context or 1)


def _within_memory(work: Callable[[ParallelMesh], int], mesh: ParallelMesh) -> int:
    """Return what `work` does. Raises MegahybridError where `mesh` has too little memory for it."""
    try:
        return work(mesh)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        context = f" --context={mesh.context.size}" if mesh.context.size > 1 else ""
        raise MegahybridError(
            f"out of memory on {mesh.device} with --tensor={mesh.tensor.size}{context} "
            f"({first_line(error)[:120]}). Use more ranks, or shorter texts."
        ) from error


def _start(command: Sequence[str], ranks: int) -> int:
    from megahybrid.parallel.local_launch import launch_local

    with tempfile.TemporaryDirectory(prefix="megahybrid-") as logs:
        failure = launch_local(
            ["-m", "megahybrid", *command], ranks, Path(logs), stopping="stopping"
        )
    if failure is None:
        return EXIT_DONE
    if not failure.stop_asked:
        tell(failure.message)
    return failure.exit_code


def _rank(work: Callable[[ParallelMesh], int], place: Rendezvous, device: str, context: int) -> int:
    from megahybrid.parallel.local_launch import (
        STOP_SIGNALS,
        end_with_launcher,
        launcher_logs,
        lost_peer,
        record_failure,
    )

    logs = launcher_logs()
    if logs is not None:
        end_with_launcher()
        # It starts ranks with these held back; here there is nothing to save.
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    terminal = os.fdopen(os.dup(2), "w")
    if place.rank:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
    try:
        world = initialise_distributed(device)
        tensor = world.world_size // context
        mesh = ParallelMesh.from_world(tensor=tensor, context=context, device=world.device)
        code = _within_memory(work, mesh)
        shutdown_distributed(ok=True)
        return code
    except MegahybridError as error:
        message, code = str(error), error.exit_code
    except Exception as error:
        message, code = f"rank {place.rank}: {type(error).__name__}: {first_line(error)}", 1
        if not lost_peer(message):
            traceback.print_exc(file=terminal)
    if logs is not None:
        record_failure(logs, place.rank, message, consequence=lost_peer(message))
    elif not place.rank:
        tell(message, terminal)
    terminal.flush()
    sys.stdout.flush()
    # Peers may wait in a collective for ever; leaving without teardown closes our connections.
    os._exit(code)
