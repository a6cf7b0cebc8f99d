"""What only a cluster can do to a run: nodes that go, jobs sent away. Ranks pretend to train."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from launch.records import attempts
from megahybrid.heartbeat import read_beats
from tests.launch.cluster import Cluster, missing
from tests.launch.runs import Run, cluster, slurm, until

__all__ = ["cluster", "slurm"]
pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.usefixtures("slurm"),
    pytest.mark.timeout(300),
]


def test_a_lost_node_is_survived_on_the_others(tmp_path: Path, cluster: Cluster) -> None:
    run = Run(tmp_path, nodes=2, steps=120)
    run.until("RUNNING .* step [1-9]")
    # t1 runs the batch script; t2 only ranks.
    cluster.power_off("t2")
    try:
        run.until("PENDING|try 2", 90)
        with contextlib.suppress(AssertionError):
            run.start_now()
        run.until("RUNNING .*try [2-9] t\\[1,3\\]", 90)
        run.until("DONE", 60)
    finally:
        cluster.power_on("t2")
        cluster.call("scontrol", "update", "NodeName=t2", "State=RESUME", check=False)
        until(
            lambda: "idle" in cluster.call("sinfo", "-h", "-n", "t2", "-p", "main", "-o", "%T"),
            "t2 back",
            60,
        )
    assert attempts(run.directory)[0].code != 0


def test_a_preempted_run_saves_in_the_grace_time_and_comes_back(
    tmp_path: Path, cluster: Cluster
) -> None:
    run = Run(tmp_path, nodes=3, steps=60, more="partition: low")
    run.until("RUNNING .* step [1-9]")
    cluster.call(
        "sbatch", "-p", "high", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 3"
    )
    run.until("PENDING|try 2", 60)
    run.start_now()
    run.until("DONE after 2 attempts", 90)
    first, second = attempts(run.directory)
    assert first.code == 75 and second.checkpoint_before == first.step


def test_a_stopped_rank_is_noticed_named_and_replaced(tmp_path: Path, cluster: Cluster) -> None:
    run = Run(tmp_path, nodes=1, steps=40)
    run.until("RUNNING .* step 1[0-9]")
    os.kill(read_beats(run.directory)[1].pid, signal.SIGSTOP)
    run.start_now()
    run.until("DONE after 2 attempts", 90)
    first, second = attempts(run.directory)
    assert first.code == 137 and first.reason.startswith("hang: rank 1 gave no sign for ")
    assert second.checkpoint_before == first.checkpoint >= 10
    stacks = run.directory / "logs" / f"{run.numbers[0]}.0" / "stacks-0001.txt"
    assert "pretend.py" in stacks.read_text()
