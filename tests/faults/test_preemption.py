"""Jobs that are sent away again and again, before their ranks have taken a step. Ranks pretend to
train; Slurm is real. None of it counts against the run, and `status` says what squeue says."""

import re
import time
from pathlib import Path

import pytest

from megahybrid.launch import control
from megahybrid.launch import slurm as slurm_commands
from megahybrid.launch.records import attempts, read_records
from tests.launch.cluster import Cluster, missing
from tests.launch.runs import Run, cluster, slurm, until

__all__ = ["cluster", "slurm"]
pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.usefixtures("slurm"),
    pytest.mark.timeout(400),
]
# So long that the job is sent away while its nodes are looked at.
CHECK = "pairs: false, command: 'sleep {seconds}'"


class Storm:
    """A run in a partition that others may empty, and what was seen of it meanwhile."""

    def __init__(self, run: Run, cluster: Cluster) -> None:
        self.run = run
        self.cluster = cluster
        self.compared: list[str] = []

    def _job(self) -> tuple[str, str]:
        words = ("squeue", "-h", "-j", self.run.numbers[0], "-O", "State:20,RestartCnt:20")
        state, restarts = (*self.cluster.call(*words, check=False).split(), "", "")[:2]
        return "RUNNING" if state == "SIGNALING" else state, restarts

    def look(self) -> str:
        """The state in squeue's words. Where it stayed the same meanwhile, status says the same."""
        before = self._job()
        line = self.run.status
        if before != self._job() or not before[0]:
            return before[0]
        state, restarts = before
        told = re.match(r"run[^:]*: ([A-Z ]+) job", line)
        assert told and told[1] == state, (before, line)
        assert " failed before" not in line, line
        if state == "RUNNING":
            assert f" try {int(restarts) + 1} " in line, (before, line)
        self.compared.append(line)
        return state

    def until(self, *states: str, seconds: float = 90) -> None:
        until(lambda: self.look() in states, lambda: f"{states}: {self.run.status}", seconds)

    def preempt(self, after: float) -> None:
        """So many seconds after it began to run."""
        self.until("RUNNING")
        begun = time.monotonic()
        while time.monotonic() < begun + after:
            self.look()
        nodes = f"-N{len(self.cluster.nodes)}"
        options = ("-p", "high", nodes, "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
        self.cluster.call("sbatch", *options)
        self.until("PENDING", "COMPLETING")
        self.until("PENDING")
        while self.look() == "PENDING":
            words = ("scontrol", "update", f"JobId={self.run.numbers[0]}", "StartTime=now+3")
            self.cluster.call(*words, check=False)
            until(lambda: self.look() != "PENDING" or None, "a start", 60)


@pytest.mark.parametrize("check_seconds", [14, 3], ids=["nodes-are-checked", "ranks-start"])
def test_a_storm_of_preemptions_before_the_first_save_costs_no_attempt(
    check_seconds: int, tmp_path: Path, cluster: Cluster
) -> None:
    check = CHECK.format(seconds=check_seconds)
    run = Run(tmp_path, nodes=3, steps=80, more="partition: low", check=check)
    storm = Storm(run, cluster)
    for seconds in (2, 5, 7, 10):
        storm.preempt(seconds)
    run.until("DONE after", 90)
    assert len(storm.compared) > 40
    *sent_away, last = attempts(run.directory)
    assert len(sent_away) >= 3 and last.code == 0
    assert all("preempted" in one.reason for one in sent_away), sent_away
    assert not any(one.failed or one.counts for one in sent_away)
    assert not [line for line in read_records(run.directory) if line["event"] == "bad_node"]


@pytest.mark.parametrize("options", [{"chain": 2}, {"chain": 2, "array": True}], ids=str)
def test_a_preempted_link_of_a_chain_goes_on_itself(
    options: dict, tmp_path: Path, cluster: Cluster
) -> None:
    """The last task of an array has the array's own number; the others are not put back with it."""
    run = Run(tmp_path, nodes=1, steps=40, more="partition: low", **options)
    run.until("RUNNING .* step age")
    (running,) = [one for one in control.queued(run.directory) if one.state == "RUNNING"]
    slurm_commands.warn(running.job)  # the first link is over
    until(lambda: len(attempts(run.directory)) == 2, "the second link", 60)
    run.until("RUNNING .*try 1 .* step age", 60)
    nodes = f"-N{len(cluster.nodes)}"
    away = ("-p", "high", nodes, "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    cluster.call("sbatch", *away)
    run.until("PENDING .* after attempt 2: stopped and saved: preempted", 60)
    control.requeue(run.directory)
    run.until("DONE after 3 attempts", 90)
    first, second, third = attempts(run.directory)
    assert first.job != second.job and (second.job, 1) == (third.job, third.attempt)
    until(lambda: not slurm_commands.queue(), "an empty queue", 30)
