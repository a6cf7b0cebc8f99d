"""Real training on a real Slurm, two nodes of two ranks: interrupted, it is the same run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megahybrid.heartbeat import read_beats
from megahybrid.launch import slurm as commands
from megahybrid.launch.records import attempts
from megahybrid.launch.submit import plan, submit
from tests.faults.conftest import ROOT, environment
from tests.launch.cluster import missing
from tests.launch.runs import Submitted, cluster, slurm
from tests.train.example import arithmetic_of, checkpoint_bytes, steps_so_far

__all__ = ["cluster", "slurm"]
pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.usefixtures("slurm"),
    pytest.mark.timeout(400),
]
SITE = f"""
name: pretend
time_limit: "0:30:00"
gpus_per_node: 0
ranks_per_node: 2
exclusive: false
memory: null
stop_lead_seconds: 60
python: [{sys.executable}]
environment: {{MASTER_ADDR: 127.0.0.1, PYTHONPATH: {ROOT}, OMP_NUM_THREADS: "1"}}
node_check: {{free_disk_gib: 0, free_memory_gib: 0}}
watchdog: {{every: 1, silent: 60}}
"""
# The run as it is, with half a second between steps: time for a test to look.
SLOWLY = (
    "import sys, time; from megahybrid.train.engine import Engine; step = Engine.train_step; "
    "Engine.train_step = lambda *a, **k: (time.sleep(0.5), step(*a, **k))[1]; "
    "from megahybrid.cli import main; sys.exit(main(['train', *sys.argv[1:]]))"
)


@pytest.fixture(scope="module")
def oracle(prepared: Path) -> Path:
    """The same four ranks on this machine, never disturbed."""
    command = [sys.executable, "-m", "megahybrid", "train", "run.yaml", "--processes", "4"]
    done = subprocess.run(
        [*command, "directory=four", "parallel.tensor=2"],
        cwd=prepared,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return prepared / "four"


@pytest.fixture
def run(example: Path, monkeypatch: pytest.MonkeyPatch) -> Submitted:
    monkeypatch.chdir(example)
    (example / "site.yaml").write_text(SITE)
    job, resolved = plan(
        example / "run.yaml",
        [f"directory={example / 'run'}", "parallel.tensor=2"],
        site=str(example / "site.yaml"),
        nodes=2,
    )
    job = job.model_copy(update={"train": ("-c", SLOWLY)})
    return Submitted(job, submit(job, resolved))


@pytest.mark.quick
def test_warned_of_its_time_limit_it_saves_and_is_the_same_run(
    run: Submitted, oracle: Path
) -> None:
    run.until("RUNNING .* step [3-9] loss", 150)
    commands.warn(run.numbers[0])
    run.start_now()
    run.until("DONE after 2 attempts", 200)
    assert run.codes() == [75, 0]
    first, second = attempts(run.directory)
    assert second.checkpoint_before == first.step
    assert arithmetic_of(run.directory) == arithmetic_of(oracle)
    assert checkpoint_bytes(run.directory) == checkpoint_bytes(oracle)


def test_a_rank_killed_on_the_second_node_costs_steps_only(run: Submitted, oracle: Path) -> None:
    run.until("RUNNING .* step [4-9] loss", 150)
    assert steps_so_far(run.directory) >= 4
    os.kill(read_beats(run.directory)[3].pid, signal.SIGKILL)
    run.start_now()
    run.until("DONE after 2 attempts", 200)
    assert run.codes() == [137, 0]
    assert attempts(run.directory)[0].reason.startswith("rank 3 on ")
    assert arithmetic_of(run.directory) == arithmetic_of(oracle)
