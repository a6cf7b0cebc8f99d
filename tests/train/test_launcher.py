"""Ranks end together: the first failure's own code and words, nobody left, whatever was killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megahybrid.parallel import local_launch
from megahybrid.parallel.local_launch import launch_local
from tests.train.example import arithmetic_of, steps_so_far
from tests.train.forked import ROOT, Nursery, Ranks

ENDINGS: dict[str, tuple[str, int, int, str]] = {
    "every code comes back as it was": ("sys.exit(3 if rank == 1 else 0)", 1, 3, "code 3"),
    "a user's mistake is 2": ("sys.exit(2)", 0, 2, "code 2"),
    "a signal is 128 and its number": (
        "os.kill(os.getpid(), 9) if rank == 1 else time.sleep(60)",
        1,
        137,
        "rank 1 of 2 was ended by SIGKILL.",
    ),
    "a survivor that traps TERM is killed": (
        "sys.exit(4) if rank == 0 else [signal.signal(15, signal.SIG_IGN), time.sleep(60)]",
        0,
        4,
        "code 4",
    ),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_first_failure_ends_all_ranks(ending: str, tmp_path: Path, handlers: None) -> None:
    body, rank, code, words = ENDINGS[ending]
    start = "import os, signal, sys, time; rank = int(os.environ['RANK']); "
    began = time.monotonic()
    failure = launch_local(["-c", start + body], 2, tmp_path)
    assert failure is not None
    assert (failure.rank, failure.exit_code) == (rank, code)
    assert words in failure.message
    assert time.monotonic() - began < 40, "ranks that are not ended sleep for a minute"


def test_a_failure_that_follows_from_another_is_not_the_one_told(
    tmp_path: Path, handlers: None
) -> None:
    """Rank 0 hears that its peer is gone and is the first to end."""
    script = (
        "import json, os, sys, time; from pathlib import Path\n"
        "rank = int(os.environ['RANK'])\n"
        "entry = {'time': time.time(), 'message': f'words of {rank}', 'consequence': rank == 0}\n"
        "Path(sys.argv[1], f'rank-{rank:04d}.error.json').write_text(json.dumps(entry))\n"
        "time.sleep(0.2 * rank)\n"
        "sys.exit(1 + rank)\n"
    )
    failure = launch_local(["-c", script, str(tmp_path)], 2, tmp_path)
    assert failure is not None
    assert (failure.rank, failure.exit_code, failure.message) == (1, 2, "words of 1")


def test_ranks_that_all_end_well_are_no_failure(tmp_path: Path, handlers: None) -> None:
    assert launch_local(["-c", "pass"], 2, tmp_path) is None
    assert not list(tmp_path.iterdir())


LONGER = "stages.2.tokens=30720"  # so that a run goes on while a test looks


def test_a_signal_before_there_are_ranks_reaches_them(
    tmp_path: Path, handlers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a thread that does not hold it back: the system may choose any."""
    started = local_launch.start_processes

    def interrupted(**details: Any) -> Any:
        context = started(**details)
        # What the system's choice of another thread comes to: the handler runs at once.
        handler = signal.getsignal(signal.SIGTERM)
        assert callable(handler)
        handler(signal.SIGTERM, None)
        return context

    monkeypatch.setattr(local_launch, "start_processes", interrupted)
    script = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])\n"
        "time.sleep(20)\n"
    )
    failure = launch_local(["-c", script], 2, tmp_path)
    assert failure is not None and failure.exit_code == 75 and failure.stop_asked


COMMAND = ["train", "run.yaml", LONGER, "parallel.tensor=2", "--processes", "2"]


def children(pid: int) -> list[int]:
    """The ranks of a launcher."""
    return [int(pid) for pid in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Launch:
    """`megahybrid train … --processes 2` in a process group of its own."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.output = folder / "output"
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megahybrid", *COMMAND, *overrides],
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                start_new_session=True,
            )

    def until(self, condition: Callable[[], bool], seconds: float = 90.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.005)

    def wait(self, seconds: float = 90.0) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(self.output.read_text()) from None

    def last_line(self) -> str:
        return self.output.read_text().strip().splitlines()[-1]


class Forked(Ranks):
    """The same, started from what has been imported."""

    def __init__(
        self, nursery: Nursery, folder: Path, *overrides: str, fault: str | None = None
    ) -> None:
        super().__init__(nursery, [*COMMAND, *overrides], 1, folder, fault=fault, launches=True)
        (self.pid,) = self.pids

    def reaches(self, condition: Callable[[], bool]) -> None:
        assert self.until(condition, 90), self.text()


def gone(pids: Sequence[int], seconds: float) -> bool:
    """Whether all of these end within some time."""
    deadline = time.monotonic() + seconds
    while any(_runs(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_launch_through_stops_and_kills_is_the_run_that_had_none(
    nursery: Nursery, example: Path
) -> None:
    run = example / "launched"
    whole = Ranks(
        nursery, ["train", "run.yaml", LONGER, "directory=whole", "parallel.tensor=2"], 2, example
    )
    assert whole.wait() == [0, 0], whole.text()

    # While its ranks still import: the signal is kept for them.
    launch = Launch(example, "directory=launched")
    launch.until(lambda: len(children(launch.process.pid)) == 2)
    launch.process.send_signal(signal.SIGTERM)
    assert launch.wait() == 75, launch.output.read_text()
    assert steps_so_far(run) <= 1
    assert launch.last_line() == (
        "megahybrid: run launched stopped early and saved; the same command goes on with it."
    )

    # A rank that is killed.
    forked = Forked(nursery, example, "directory=launched")
    forked.reaches(lambda: steps_so_far(run) >= 5)
    ranks = children(forked.pid)
    began = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    assert forked.wait() == [128 + signal.SIGKILL], forked.text()
    assert time.monotonic() - began < 40 and gone(ranks, 0)
    assert forked.last_line() == "megahybrid: rank 1 of 2 was ended by SIGKILL."

    # The launcher itself, killed: nothing of it may go on and hold the run.
    before = steps_so_far(run)
    forked = Forked(nursery, example, "directory=launched")
    forked.reaches(lambda: steps_so_far(run) >= before + 2)
    ranks = children(forked.pid)
    os.kill(forked.pid, signal.SIGKILL)
    assert gone(ranks, 40)
    assert forked.wait() == [-signal.SIGKILL]

    forked = Forked(nursery, example, "directory=launched")
    assert forked.wait() == [0], forked.text()
    assert forked.last_line().startswith("Run launched is complete")
    assert arithmetic_of(run) == arithmetic_of(example / "whole")


RAISED: dict[str, tuple[str, int, str]] = {
    "an exception of one rank": (
        "raises_on_one_rank",
        1,
        "megahybrid: rank 1: ZeroDivisionError: on purpose (traceback in run/logs/rank-0001.log)",
    ),
    "one rank's mistake of the user": (
        "user_mistake_on_one_rank",
        2,
        "megahybrid: books/shard-00000.bin: on purpose.",
    ),
}


@pytest.mark.parametrize("what", RAISED)
def test_the_last_line_tells_of(what: str, nursery: Nursery, example: Path) -> None:
    """Of the rank that failed, not of those that lost it; with its exit code."""
    fault, code, line = RAISED[what]
    launch = Forked(nursery, example, "directory=run", fault=fault)
    launch.reaches(lambda: steps_so_far(example / "run") >= 2)
    began = time.monotonic()
    assert launch.wait() == [code], launch.text()
    assert time.monotonic() - began < 40
    assert launch.last_line() == line
    text = launch.text()
    assert "Traceback" not in text, text
    if code == 1:
        log = (example / "run" / "logs" / "rank-0001.log").read_text()
        assert "Traceback" in log and "ZeroDivisionError: on purpose" in log
