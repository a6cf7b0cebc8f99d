"""Ranks that start in a fraction of a second: forked from a process that has imported everything.

They run the real command line with torchrun's variables set, so they end with its exit codes and
can be killed, stopped and limited one by one. `Ranks` is what a test holds; running this file is
the process that forks. A self-test that one of its ranks has passed is not run again by another
that asks the same of the same code: it is half of what a tiny run costs.
"""

import contextlib
import gc
import hashlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[2]
# What a rank imports as it trains, beside the modules of its command.
PRELOADED = [
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.utils.pin_memory",
    "megahybrid.commands.local_restarts",
    "megahybrid.commands.train",
    "megahybrid.train.engine.gradient_accumulation",
    "megahybrid.train.run",
    "numpy.ma",
    "rich._emoji_codes",
    "ruamel.yaml",
    "torch._dynamo",
    "torch._inductor.compile_fx",
]


class Nursery:
    """The process that forks; a context manager."""

    def __init__(self) -> None:
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        }
        environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            # By its path: the package `tests` would have every annotation checked, and be slow.
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )

    def ask(self, **order: Any) -> Any:
        """Send one order and wait for its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=20)


class Ranks:
    """One launch of `megahybrid *arguments` on `world_size` ranks, with their output in files."""

    def __init__(
        self,
        nursery: Nursery,
        arguments: Sequence[str],
        world_size: int,
        folder: Path,
        *,
        fault: str | None = None,
        file_bytes: int | None = None,
        launches: bool = False,
        outputs: Path | None = None,
    ) -> None:
        """`fault` names a function of tests/train/faults.py, called on each rank before it starts;
        no file of a rank can grow beyond `file_bytes`. With `launches` the command is one that
        starts ranks itself: they are forked from it, and the fault is theirs. What they print lies
        in `outputs`, or else in `folder`, where they run."""
        self.nursery = nursery
        self.outputs = [(outputs or folder) / f"output-{rank}" for rank in range(world_size)]
        self.pids: list[int] = nursery.ask(
            arguments=list(arguments),
            outputs=list(map(str, self.outputs)),
            folder=str(folder),
            port=_free_port(),
            fault=fault,
            file_bytes=file_bytes,
            launches=launches,
        )
        self.codes: dict[int, int] = {}

    def wait(self, seconds: float = 120.0) -> list[int]:
        """Exit codes by rank, -n for signal n; ranks that take longer are killed."""
        until = time.monotonic() + seconds
        while len(self.codes) < len(self.pids) and time.monotonic() < until:
            self._look()
            time.sleep(0.01)
        late = [pid for rank, pid in enumerate(self.pids) if rank not in self.codes]
        for pid in late:
            os.kill(pid, signal.SIGKILL)
        while len(self.codes) < len(self.pids):
            self._look()
        assert not late, f"still running after {seconds:g} s\n{self.text()}"
        return [self.codes[rank] for rank in range(len(self.pids))]

    def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> bool:
        """Wait for a condition; False when a rank ended first."""
        deadline = time.monotonic() + seconds
        while not condition():
            self._look()
            if self.codes:
                return False
            assert time.monotonic() < deadline, f"not within {seconds:g} s\n{self.text()}"
            time.sleep(0.002)
        return True

    def runs(self) -> bool:
        """Whether no rank has ended yet."""
        self._look()
        return not self.codes

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """A signal to some ranks, or to all."""
        for rank in ranks or range(len(self.pids)):
            self._look()
            if rank not in self.codes:
                os.kill(self.pids[rank], number)

    def text(self) -> str:
        """What all ranks wrote to their terminal."""
        return "".join(path.read_text() for path in self.outputs)

    def last_line(self, rank: int = 0) -> str:
        """The last line a rank wrote."""
        return self.outputs[rank].read_text().strip().splitlines()[-1]

    def _look(self) -> None:
        codes = self.nursery.ask(codes=self.pids)
        self.codes = {rank: code for rank, code in enumerate(codes) if code is not None}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve() -> None:
    """Fork ranks and tell their exit codes, one order a line, until the test goes away."""
    import torch

    from megahybrid.train.engine.settings import prepare_deepspeed

    prepare_deepspeed(torch.device("cpu"))
    for name in PRELOADED:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="passed-") as passed:
        _serve_orders(Path(passed))


def _serve_orders(passed: Path) -> None:
    gc.collect()
    gc.freeze()  # what is imported is walked over by no rank's collections
    ended: dict[int, int] = {}
    for line in sys.stdin:
        order = json.loads(line)
        if "codes" in order:
            with contextlib.suppress(ChildProcessError):
                while (found := os.waitpid(-1, os.WNOHANG))[0]:
                    ended[found[0]] = os.waitstatus_to_exitcode(found[1])
            answer: list[Any] = [ended.get(pid) for pid in order["codes"]]
        else:
            answer = [_fork(rank, order, passed) for rank in range(len(order["outputs"]))]
            for pid in answer:
                ended.pop(pid, None)  # numbers come round again within one run of the suite
        print(json.dumps(answer), flush=True)


def _fork(rank: int, order: dict[str, Any], passed: Path) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        _become_rank(rank, order, parent)
        _remember_self_tests(passed, str(order["fault"]))
        if order["launches"]:
            from megahybrid.parallel import local_launch

            local_launch.start_processes = partial(_Started, fault=order["fault"])
        else:
            _break(rank, order["fault"])
        code = _main(order["arguments"])
    finally:
        os._exit(code)


def _main(arguments: Sequence[str]) -> int:
    from megahybrid.cli import main

    try:
        return main(arguments)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _break(rank: int, fault: str | None) -> None:
    if fault:
        from tests.train import faults

        getattr(faults, fault)(rank)


class _Started:
    """What torch's start_processes returns, of ranks that are forked from the launcher."""

    def __init__(
        self,
        args: dict[int, tuple[str, ...]],
        envs: dict[int, dict[str, str]],
        fault: str | None,
        **_: Any,
    ) -> None:
        self.subprocess_handlers = {
            rank: SimpleNamespace(proc=_Rank(rank, words, envs[rank], fault))
            for rank, words in args.items()
        }

    def close(self, number: int, timeout: float) -> None:
        ranks = [handler.proc for handler in self.subprocess_handlers.values()]
        until = time.monotonic() + timeout
        for rank in ranks:
            rank.send_signal(number)
        while any(rank.poll() is None for rank in ranks):
            if time.monotonic() > until:
                for rank in ranks:
                    rank.kill()
            time.sleep(0.01)


class _Rank:
    """As much of a Popen as the launcher uses."""

    def __init__(
        self, rank: int, words: tuple[str, ...], environment: dict[str, str], fault: str | None
    ) -> None:
        assert words[:2] == ("-m", "megahybrid"), words
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        code = 70
        try:
            from megahybrid.parallel.local_launch import STOP_SIGNALS

            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_DFL)  # as in a program that begins
            os.environ |= environment
            _break(rank, fault)
            code = _main(words[2:])
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _become_rank(rank: int, order: dict[str, Any], parent: int) -> None:
    import resource

    from megahybrid.parallel.local_launch import LAUNCHER, end_with_launcher

    os.environ[LAUNCHER] = str(parent)
    end_with_launcher()
    del os.environ[LAUNCHER]
    output = os.open(order["outputs"][rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(order["folder"])
    world = len(order["outputs"])
    if world > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(order["port"]),
        }
    if order["file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"], order["file_bytes"]))


def _remember_self_tests(passed: Path, fault: str) -> None:
    """Have this rank leave in `passed` what it passes, and take what is there for passed."""
    from megahybrid.train import stage_model

    test = stage_model.run_self_test

    def remembered(*asked: Any, rank: int, **how: Any) -> list[tuple[str, str, float]]:
        question = repr((asked, how, fault)).encode()
        answer = passed / hashlib.sha256(question).hexdigest()
        if not answer.exists():
            found = test(*asked, rank=rank, **how)
            whole = answer.with_suffix(f".{os.getpid()}")
            whole.write_text(json.dumps(found))
            whole.rename(answer)
        return [tuple(line) for line in json.loads(answer.read_text())]

    stage_model.run_self_test = remembered


if __name__ == "__main__":
    _serve()
