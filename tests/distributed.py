"""Pools of gloo workers that stay alive over the test session: `run(world_size, function, *args)`.

Workers are forked from one process that has imported what they need (tests/preloaded.py).
`function` is a top-level function of a test module, called on every rank as
function(ranks, *args); arguments and results are pickled.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import select
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

START_SECONDS = 120.0
PRELOADED = ["tests.preloaded"]  # by the process that forks


class RankFailed(AssertionError):
    """A rank raised, died or did not come back. `rank` is the first one that did."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


@dataclass
class Ranks:
    """What a function on a worker is told: its rank, the world size, and meshes of that world."""

    rank: int
    world_size: int
    meshes: dict[Any, Any] = field(default_factory=dict)

    def mesh(self, tensor: int | None = None, context: Any = 1) -> Any:
        """The mesh of this tensor degree (default: all ranks) and context degree or degrees, built
        at its first use."""
        from megahybrid.parallel.mesh import ParallelMesh

        degree = self.world_size if tensor is None else tensor
        key = degree if context == 1 else (degree, context)
        if key not in self.meshes:
            self.meshes[key] = ParallelMesh.from_world(tensor=degree, context=context)
        return self.meshes[key]


def run(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_seconds: float = 120.0,
) -> list[Any]:
    """The results of `function` by rank. Raises RankFailed with the rank's traceback.

    After any failure the pool is killed, because its ranks may be waiting in different
    collectives; the next call starts a new one.
    """
    if world_size not in _pools:
        _pools[world_size] = Pool(world_size)
    try:
        return _pools[world_size].run(function, args, timeout_seconds)
    except BaseException:
        _pools.pop(world_size).kill()
        raise


def close_pools() -> None:
    """Ends all workers."""
    while _pools:
        _pools.popitem()[1].close()


class Pool:
    """The workers of one world size."""

    def __init__(self, world_size: int) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        context = start_context()
        self.connections: list[Connection] = []
        self.processes: list[multiprocessing.process.BaseProcess] = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, world_size, theirs, str(self._stack_file(rank)), os.getpid()),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)
        try:
            # Rank 0 binds a free port itself and tells it: nobody can take it in between.
            port = self._receive({0}, START_SECONDS)[0]
            self._send(port)
            self._receive(set(range(world_size)), START_SECONDS)
        except BaseException:
            self.kill()
            raise

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], seconds: float) -> list[Any]:
        """One call on every rank."""
        self._send((function, args))
        results = self._receive(set(range(len(self.processes))), seconds)
        return [results[rank] for rank in range(len(self.processes))]

    def close(self) -> None:
        """Lets the ranks leave together; kills those that do not."""
        with contextlib.suppress(OSError):
            self._send(None)
        until = time.monotonic() + 5
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """Ends the workers at once."""
        for process in self.processes:
            process.kill()
        for process, connection in zip(self.processes, self.connections, strict=True):
            process.join()
            connection.close()
        self.folder.cleanup()

    def _send(self, message: Any) -> None:
        data = pickle.dumps(message)
        for rank, connection in enumerate(self.connections):
            try:
                connection.send_bytes(data)
            except OSError as error:
                raise RankFailed(rank, f"rank {rank} is gone ({error})") from error

    def _receive(self, waiting: set[int], seconds: float) -> dict[int, Any]:
        """One message of each rank in `waiting`; the first failure that arrives is raised."""
        results: dict[int, Any] = {}
        until = time.monotonic() + seconds
        while waiting:
            pending = {self.connections[rank]: rank for rank in waiting}
            ready = wait(list(pending), max(0.0, until - time.monotonic()))
            if not ready:
                raise RankFailed(min(waiting), self._describe_hang(waiting, seconds))
            for connection in ready:
                rank = pending[connection]  # type: ignore[index]
                results[rank] = self._read(rank)
                waiting = waiting - {rank}
        return results

    def _read(self, rank: int) -> Any:
        try:
            ok, value = pickle.loads(self.connections[rank].recv_bytes())
        except (EOFError, ConnectionError):
            self.processes[rank].join(5)
            code = self.processes[rank].exitcode
            raise RankFailed(rank, f"rank {rank} died with exit code {code}") from None
        if not ok:
            raise RankFailed(rank, f"rank {rank} of {len(self.processes)} raised\n{value}")
        return value

    def _stack_file(self, rank: int) -> Path:
        return Path(self.folder.name) / f"stack-{rank}"

    def _describe_hang(self, waiting: set[int], seconds: float) -> str:
        """Who is missing, and where each of them is."""
        for rank in waiting:
            os.kill(self.processes[rank].pid or 0, signal.SIGUSR1)
        time.sleep(0.5)
        lines = [f"ranks {sorted(waiting)} did not answer within {seconds:g} s"]
        for rank in sorted(waiting):
            file = self._stack_file(rank)
            lines.append(f"rank {rank}:\n{file.read_text() if file.exists() else 'no stack'}")
        return "\n".join(lines)


_pools: dict[int, Pool] = {}


def start_context() -> Any:
    """Return how workers start: forked, but for a CUDA driver, which does not survive a fork."""
    import torch

    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _serve(
    rank: int, world_size: int, connection: Connection, stack_file: str, session: int
) -> None:
    """A worker's life: join the world, answer calls until told to stop or left alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the session ends us
    threading.Thread(target=_end_with, args=(session,), daemon=True).start()
    with open(stack_file, "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True) if rank == 0 else None
        if store is not None:
            connection.send_bytes(pickle.dumps((True, store.port)))
        port = pickle.loads(connection.recv_bytes())
        dist.init_process_group(
            "gloo",
            store=store or dist.TCPStore("127.0.0.1", port),
            rank=rank,
            world_size=world_size,
        )
        connection.send_bytes(pickle.dumps((True, None)))
        ranks = Ranks(rank, world_size)
        while (answer := _answer(connection.recv_bytes(), ranks)) is not None:
            connection.send_bytes(answer)
        dist.barrier()
        dist.destroy_process_group()


def _answer(message: bytes, ranks: Ranks) -> bytes | None:
    """The pickled result or traceback of one call; None when asked to stop."""
    try:
        call = pickle.loads(message)
        if call is None:
            return None
        function, args = call
        return pickle.dumps((True, function(ranks, *args)))
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))


def _end_with(session: int) -> None:
    """Notices that the test session was killed, which a rank inside a collective cannot.

    It is no parent of a forked worker, and the process that forks stays while a worker does.
    """
    with contextlib.suppress(ProcessLookupError):
        select.select([os.pidfd_open(session)], [], [])
    os._exit(1)
