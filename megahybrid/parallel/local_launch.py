"""Start the ranks of one machine through torch's own process launcher, and end them together.

torchrun turns a child's exit code 2 into 1 and waits 30 s for survivors that trap TERM. Here the
first failing child's own code comes back and survivors are gone within seconds.
"""

import contextlib
import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsDest, start_processes

from megahybrid.parallel.rendezvous import LAUNCHER

SURVIVOR_SECONDS = 5
LOOK_SECONDS = 2.0  # between two questions whether a rank hangs
STACKS_SECONDS = 2.0  # what writing the stacks may take before the ranks are killed
# Each asks every rank to save and leave at the end of its step.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
LAUNCHER_LOGS = "MEGAHYBRID_LOCAL_LOGS"  # the folder where they leave what ended them


@dataclass(frozen=True)
class RankFailure:
    """The rank that failed first and what it left behind."""

    rank: int
    exit_code: int  # as a shell reports it: 128 + n for signal n
    message: str
    stop_asked: bool = False  # a signal had asked the launcher to stop


def failure_file(log_directory: Path, rank: int) -> Path:
    """Return the path where a rank leaves the error that ended it."""
    return log_directory / f"rank-{rank:04d}.error.json"


def record_failure(log_directory: Path, rank: int, message: str, *, consequence: bool) -> None:
    """Record the failure of this rank.

    `consequence` marks an error that another rank's end caused.
    """
    entry = {"time": time.time(), "message": message, "consequence": consequence}
    # A full disk may be what failed; then the exit code alone must do.
    with contextlib.suppress(OSError):
        failure_file(log_directory, rank).write_text(json.dumps(entry))


def started_by_launcher() -> bool:
    """Return whether this process is a rank that `launch_local` started."""
    return LAUNCHER in os.environ


def launcher_logs() -> Path | None:
    """The `log_directory` of the launcher that started this process; None where none did."""
    return Path(os.environ[LAUNCHER_LOGS]) if started_by_launcher() else None


def lost_peer(message: str) -> bool:
    """Return whether an error only says that another rank is gone."""
    words = ("Connection closed by peer", "Connection reset", "Broken pipe", "recvValue failed")
    return any(word in message for word in (*words, "NCCL", "remote process exited"))


def end_with_launcher() -> None:
    """Ask the kernel to end this process when the launcher dies, however it dies (Linux)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != int(os.environ[LAUNCHER]):
        os._exit(128 + signal.SIGKILL)  # it died before we could ask


class _Terminal(DefaultLogsSpecs):
    """Have ranks write where the launcher does.

    So no temporary folder stays behind, and no thread reads what nobody writes.
    """

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        destinations = super().reify(envs)
        destinations.tee_stdouts.clear()
        destinations.tee_stderrs.clear()
        return destinations


def launch_local(
    command: Sequence[str],
    processes: int,
    log_directory: Path,
    *,
    hung: Callable[[], tuple[int, str] | None] = lambda: None,
    stacks_signal: int | None = None,
    stopping: str = "stopping at the end of this step",
) -> RankFailure | None:
    """Run `python *command` once per rank and wait. None when every rank ended with 0.

    `hung` is asked now and then; when it names a rank and a reason, every rank is sent
    `stacks_signal` (to write down where it stands) and then killed.
    Signals sent to the launcher reach every rank; `stopping` says what they then do. The rendezvous
    store lives in this process on a port the system chose, so two launches never compete for one.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    log_directory.mkdir(parents=True, exist_ok=True)
    for rank in range(processes):
        failure_file(log_directory, rank).unlink(missing_ok=True)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        LAUNCHER: str(os.getpid()),
        LAUNCHER_LOGS: str(log_directory),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    environments = {
        rank: {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)
    }
    forwarder = _Forwarder(stopping)
    forwarder.install()
    # Held back, here and (they inherit it) in the ranks: a signal that comes while a rank's Python
    # still imports must not end it unasked.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    with _without_torchs_handlers():
        context: Any = start_processes(
            name="megahybrid",
            entrypoint=sys.executable,
            args={rank: tuple(command) for rank in range(processes)},
            envs=environments,
            logs_specs=_Terminal(log_dir=os.devnull),
        )
    forwarder.install()
    forwarder.begin([handler.proc for handler in context.subprocess_handlers.values()])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        codes, hang = _wait_for_first_failure(context.subprocess_handlers, hung)
        if hang is not None:
            _kill(context.subprocess_handlers, stacks_signal)
            return RankFailure(
                hang[0], 128 + signal.SIGKILL, f"hang: {hang[1]}", bool(forwarder.asked)
            )
        ended_first = {rank: code for rank, code in codes.items() if code}
    finally:
        context.close(signal.SIGTERM, timeout=SURVIVOR_SECONDS)
    if not ended_first:
        return None
    failure = _first_failure(ended_first, log_directory, processes)
    return replace(failure, stop_asked=bool(forwarder.asked))


class _Forwarder:
    """A handler of stop signals that sends each on to every rank.

    So it does with those that came before there were ranks. Python runs it on the main thread
    whichever thread the system interrupted.
    """

    def __init__(self, stopping: str) -> None:
        self.stopping = stopping
        self.ranks: list[subprocess.Popen] | None = None
        before = signal.getsignal(signal.SIGTERM)
        # Of an earlier launch: what came since it ended is for this one.
        self.asked: list[int] = list(before.asked) if isinstance(before, _Forwarder) else []

    def install(self) -> None:
        for number in STOP_SIGNALS:
            # Under nohup a closed terminal is no reason to stop.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self)

    def begin(self, ranks: list[subprocess.Popen]) -> None:
        self.ranks = ranks
        for number in self.asked:
            self._send(number)

    def __call__(self, number: int, _frame: object) -> None:
        with contextlib.suppress(OSError):  # a handler must not print, and the terminal may be gone
            if not self.asked:
                name = signal.Signals(number).name
                os.write(2, f"megahybrid: {name}: {self.stopping}.\n".encode())
        self.asked.append(number)
        self._send(number)

    def _send(self, number: int) -> None:
        for process in self.ranks or ():
            if process.poll() is None:
                process.send_signal(number)


@contextlib.contextmanager
def _without_torchs_handlers() -> Iterator[None]:
    """Keep torch's launcher from the signals: it would raise in the midst of its start."""
    name = "TORCHELASTIC_SIGNALS_TO_HANDLE"
    before = os.environ.get(name)
    os.environ[name] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _kill(handlers: dict, stacks_signal: int | None) -> None:
    running = [handler.proc for handler in handlers.values() if handler.proc.poll() is None]
    for process in running:
        if stacks_signal is not None:
            # A stopped process must run again to say where it stood.
            process.send_signal(signal.SIGCONT)
            process.send_signal(stacks_signal)
    time.sleep(STACKS_SECONDS)
    for process in running:
        process.kill()


def _wait_for_first_failure(
    handlers: dict, hung: Callable[[], tuple[int, str] | None]
) -> tuple[dict[int, int], tuple[int, str] | None]:
    """Exit codes of the ranks that ended, once all have or one has failed or hangs."""
    looked = time.monotonic()
    while True:
        codes = {rank: handler.proc.poll() for rank, handler in handlers.items()}
        ended = {rank: code for rank, code in codes.items() if code is not None}
        if len(ended) == len(handlers):
            return ended, None
        if any(ended.values()):
            # Others may be writing down the same failure: a moment lets the first one be told.
            time.sleep(0.5)
            codes = {rank: handler.proc.poll() for rank, handler in handlers.items()}
            return {rank: code for rank, code in codes.items() if code is not None}, None
        if time.monotonic() - looked > LOOK_SECONDS:
            looked = time.monotonic()
            hang = hung()
            if hang is not None:
                return {}, hang
        time.sleep(0.05)


def _first_failure(ended: dict[int, int], log_directory: Path, processes: int) -> RankFailure:
    """The cause: a rank killed from outside, else the earliest error that is no consequence."""
    for rank, code in sorted(ended.items()):
        if code < 0:
            name = signal.Signals(-code).name
            return RankFailure(rank, 128 - code, f"rank {rank} of {processes} was ended by {name}.")
    entries = []
    for rank, code in ended.items():
        path = failure_file(log_directory, rank)
        entry = json.loads(path.read_text()) if path.exists() else {}
        entries.append(
            (entry.get("consequence", False), entry.get("time", time.time()), rank, code, entry)
        )
    _, _, rank, code, entry = min(entries, key=lambda item: item[:3])
    return RankFailure(rank, code, entry.get("message", f"rank {rank} ended with code {code}."))
