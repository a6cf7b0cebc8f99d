"""What only a cluster can do to a run: nodes that go, jobs sent away. Ranks pretend to train."""

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from megahybrid.heartbeat import read_beats
from megahybrid.launch import slurm as slurm_commands
from megahybrid.launch.control import cancel
from megahybrid.launch.records import attempts, ledger_tail
from megahybrid.launch.status import node_lines
from tests.launch.cluster import Cluster, missing
from tests.launch.runs import Run, cluster, slurm, until

__all__ = ["cluster", "slurm"]
pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.usefixtures("slurm"),
    pytest.mark.timeout(300),
]


@contextlib.contextmanager
def _healed(cluster: Cluster, node: str) -> Iterator[None]:
    """Whatever the test did to a node, it is there again afterwards."""
    try:
        yield
    finally:
        cluster.plug(node)
        if not cluster.is_on(node):
            cluster.power_on(node)
        cluster.call("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
        until(lambda: "idle" in cluster.state(node) or "alloc" in cluster.state(node), node, 60)


def _goes_on_elsewhere(run: Run, nodes: str) -> None:
    """Slurm notices in half a minute; then the run is where its last checkpoint was."""
    run.until("PENDING .* after attempt 1: |try 2", 90)
    with contextlib.suppress(AssertionError):
        run.start_now()
    run.until(f"RUNNING .*try [2-9] {nodes} step", 90)
    run.until("DONE after 2 attempts", 60)
    first, second = attempts(run.directory)
    assert first.failed and second.checkpoint_before == first.checkpoint >= 10
    assert second.code == 0


# t1 runs the batch script and ranks; t2 only ranks.
@pytest.mark.parametrize("node", ["t2", "t1"], ids=["worker", "batch-host"])
def test_a_node_without_power_is_survived_on_the_others(
    node: str, tmp_path: Path, cluster: Cluster
) -> None:
    run = Run(tmp_path, nodes=2, steps=120)
    run.until("RUNNING .* step 1[1-9]")
    with _healed(cluster, node):
        cluster.power_off(node)
        _goes_on_elsewhere(run, r"t\[1,3\]" if node == "t2" else r"t\[2-3\]")
        assert node in "".join(line for line in node_lines(run.directory) if "down" in line)


def test_a_silent_node_is_survived_and_does_no_harm_when_it_is_back(
    tmp_path: Path, cluster: Cluster
) -> None:
    run = Run(tmp_path, nodes=2, steps=120)
    run.until("RUNNING .* step 1[1-9]")
    with _healed(cluster, "t2"):
        cluster.unplug("t2")
        # Slurm or the watchdog, who is first: with a silent peer the other ranks stand still.
        run.until("RUNNING .* no sign of rank 2|PENDING", 60)
        run.until("PENDING .* after attempt 1: |try 2", 90)
        with contextlib.suppress(AssertionError):
            run.start_now()
        run.until("RUNNING .*try 2 .* step", 120)
        cluster.plug("t2")
        run.until("DONE after 2 attempts", 120)
    steps = [line["step"] for line in ledger_tail(run.directory) if line["kind"] == "step"]
    assert steps[0] == 120 and attempts(run.directory)[-1].code == 0


def test_without_a_spare_the_job_comes_back_without_the_bad_node(tmp_path: Path) -> None:
    bad = "pairs: false, command: 'echo said to be bad; test $SLURMD_NODENAME != t1'"
    run = Run(tmp_path, nodes=2, steps=10, check=bad)
    run.until(r"PENDING .* after attempt 1: bad node t1 \(site's check: said to be bad\)")
    run.start_now()
    run.until("DONE after 2 attempts", 60)
    assert attempts(run.directory)[1].nodes == ["t2", "t3"]
    assert "said to be bad" in next(x for x in node_lines(run.directory) if x.startswith("t1: "))


@pytest.mark.quick
def test_a_killed_batch_process_costs_an_attempt_and_no_more(tmp_path: Path) -> None:
    run = Run(tmp_path, nodes=1, steps=60)
    run.until("RUNNING .* step 1[1-9]")
    (supervisor,) = run.supervisors()
    os.kill(supervisor, signal.SIGKILL)
    said = "the batch process on t1 ended with 137 and decided nothing"
    run.until(f"PENDING .* after attempt 1: {said}|try 2", 60)
    with contextlib.suppress(AssertionError):
        run.start_now()
    run.until("DONE after 2 attempts", 90)
    first, second = attempts(run.directory)
    assert first.code is None and second.checkpoint_before >= 10
    log = (run.directory / "logs" / f"{run.numbers[0]}.batch.log").read_text()
    assert said in log and not (run.directory / "slurm/undecided").exists()


def test_the_time_limit_is_met_by_what_a_save_was_measured_to_take(tmp_path: Path) -> None:
    run = Run(tmp_path, nodes=1, steps=700, limit="0:04:00", save=25)
    # A minute, and twice save and step: Slurm's own warning was fixed before anything was known.
    run.until(
        "PENDING .* after attempt 1: stopped and saved: the time limit is 1(0[5-9]|1[01]) s away",
        240,
    )
    run.start_now()
    run.until("DONE after 2 attempts", 150)
    assert run.codes() == [75, 0]


def test_at_the_time_limit_the_next_job_of_the_chain_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path, nodes=1, steps=60, chain=3)
    run.until(r"RUNNING .* step [1-9].* \| \+2 in the chain")
    slurm_commands.warn(run.numbers[0])
    run.until(f"RUNNING job {run.numbers[1]} try 1 .* step", 60)
    run.until("DONE after 2 attempts", 60)
    assert [(one.job, one.code) for one in attempts(run.directory)] == [
        (run.numbers[0], 75),
        (run.numbers[1], 0),
    ]
    until(lambda: not slurm_commands.queue(), "the end of the chain", 30)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_agents_start_the_ranks_and_a_stop_is_75_again(launcher: str, tmp_path: Path) -> None:
    run = Run(tmp_path, steps=40, more=f"launcher: {launcher}")
    run.until("RUNNING .* step [1-9]", 120)
    slurm_commands.warn(run.numbers[0])
    run.start_now()
    run.until("DONE after 2 attempts", 150)
    first, second = attempts(run.directory)
    assert (first.code, second.code) == (75, 0) and second.checkpoint_before == first.step
    for node in range(2):
        log = run.directory / "logs" / f"{run.numbers[0]}.0" / f"node-{node:04d}.log"
        said = sorted(re.findall(r"rank (\d) of 4 begins", log.read_text()))
        assert said == [str(2 * node), str(2 * node + 1)]  # ranks follow the order of nodes


@pytest.mark.quick
def test_a_cancelled_chain_is_gone(tmp_path: Path) -> None:
    run = Run(tmp_path, nodes=1, steps=60, chain=3)
    run.until(r"RUNNING .* step [1-9].* \| \+2 in the chain")
    cancel(run.directory)
    assert "STOPPED with code 75: cancelled on request" in run.until("STOPPED", 60)
    until(lambda: not slurm_commands.queue(), "an empty queue", 30)


@pytest.mark.quick
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


@pytest.mark.quick
def test_a_stopped_rank_is_noticed_named_and_replaced(tmp_path: Path, cluster: Cluster) -> None:
    run = Run(tmp_path, nodes=1, steps=40)
    run.until("RUNNING .* step 1[0-9]")
    os.kill(read_beats(run.directory)[1].pid, signal.SIGSTOP)
    run.start_now()
    run.until("DONE after 2 attempts", 90)
    first, second = attempts(run.directory)
    assert first.code == 137 and first.reason.startswith("hang: rank 1 sent no heartbeat for ")
    assert second.checkpoint_before == first.checkpoint >= 10
    stacks = run.directory / "logs" / f"{run.numbers[0]}.0" / "stacks-0001.txt"
    assert "pretend.py" in stacks.read_text()


def test_ranks_that_would_overrun_the_time_limit_cost_an_attempt_and_not_the_run(
    tmp_path: Path, cluster: Cluster
) -> None:
    """At the limit Slurm kills the batch process too, and nobody would be left to requeue."""
    run = Run(tmp_path, "hang@3", steps=16)
    run.until("RUNNING .* step 3 loss", 60)
    cluster.call("scontrol", "update", f"JobId={run.numbers[0]}", "TimeLimit=1")
    line = run.until("PENDING .* after attempt 1", 90)
    assert "after attempt 1: hang: not stopped before the time limit" in line
    cluster.call("scontrol", "update", f"JobId={run.numbers[0]}", "TimeLimit=30")
    run.start_now()
    run.until("DONE after 2 attempts", 60)
    assert run.codes() == [137, 0]
