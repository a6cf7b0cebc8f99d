"""Recovery on one machine: `train --max-restarts`, and the files that ask for a save or a stop."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megahybrid.heartbeat import read_beats
from tests.faults.conftest import environment
from tests.train.example import arithmetic_of, checkpoint_bytes, steps_so_far

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


class Training:
    """One `train` in two ranks, in the background."""

    def __init__(self, folder: Path, *options: str, code: str | None = None) -> None:
        self.run = folder / "run"
        command = ["-m", "megahybrid", "train", "run.yaml", "--processes", "2", *options]
        command += ["directory=run", "parallel.tensor=2"]
        self.process = subprocess.Popen(
            [sys.executable, *(["-c", code] if code else command)],
            cwd=folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def until(self, true: Callable[[], object], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def ended(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=200)
        left = [beat.pid for beat in read_beats(self.run).values() if _alive(beat.pid)]
        assert not left
        assert not (self.run / "owner.lock").exists()
        return self.process.returncode, output


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.quick
def test_a_killed_rank_costs_steps_but_changes_nothing(example: Path, undisturbed: Path) -> None:
    with Training(example, "--max-restarts", "2") as training:
        training.until(lambda: steps_so_far(training.run) >= 5)
        os.kill(read_beats(training.run)[1].pid, signal.SIGKILL)
        code, output = training.ended()
    assert code == 0, output
    assert "starting again (1 of --max-restarts=2)." in output
    assert arithmetic_of(training.run) == arithmetic_of(undisturbed)
    assert checkpoint_bytes(training.run) == checkpoint_bytes(undisturbed)


def test_without_restarts_a_killed_rank_is_the_end(example: Path) -> None:
    with Training(example) as training:
        training.until(lambda: steps_so_far(training.run) >= 3)
        os.kill(read_beats(training.run)[1].pid, signal.SIGKILL)
        code, output = training.ended()
    assert code == 137 and "rank 1 of 2 was ended by SIGKILL." in output


def test_a_file_asks_for_a_checkpoint_and_another_for_a_stop(
    example: Path, undisturbed: Path
) -> None:
    with Training(example) as training:
        training.until(lambda: steps_so_far(training.run) >= 1)
        (training.run / "save-now").touch()
        training.until(lambda: not (training.run / "save-now").exists())
        (training.run / "stop-now").touch()
        code, output = training.ended()
    # Steps of this example are so short that the stop may meet the run's end.
    assert code in (75, 0), output
    with Training(example) as training:
        code, output = training.ended()
    assert code == 0, output
    assert arithmetic_of(training.run) == arithmetic_of(undisturbed)


# As --max-restarts=1 does, less patient.
WATCHED = """
import sys
from pathlib import Path
from megahybrid.config.site import Watchdog
from megahybrid.commands.local_restarts import train_local
command = ["-m", "megahybrid", "train", "run.yaml", "directory=run", "parallel.tensor=2"]
sys.exit(train_local(command, 2, Path("run"), 1, Watchdog(silent=8)))
"""


def test_a_rank_that_hangs_is_named_its_stack_kept_and_the_run_goes_on(
    example: Path, undisturbed: Path
) -> None:
    with Training(example, code=WATCHED) as training:
        training.until(lambda: steps_so_far(training.run) >= 3)
        os.kill(read_beats(training.run)[1].pid, signal.SIGSTOP)
        code, output = training.ended()
    assert code == 0, output
    assert "hang: rank 1 sent no heartbeat for " in output
    stacks = (training.run / "logs" / "stacks-0001.txt").read_text()
    assert "megahybrid/train/" in stacks
    assert arithmetic_of(training.run) == arithmetic_of(undisturbed)
