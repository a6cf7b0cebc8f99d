"""The batch script on a real Slurm: nodes that cannot start its process, the environment of a job,
scripts that an older version wrote, and jobs that are cancelled or put back before they train."""

import os
import sys
from pathlib import Path

import pytest

from megahybrid.errors import ConfigError
from megahybrid.launch import control
from megahybrid.launch import slurm as slurm_commands
from megahybrid.launch.records import attempts, read_records
from tests.launch.cluster import Cluster, missing
from tests.launch.runs import ROOT, Run, cluster, slurm, until

__all__ = ["cluster", "slurm"]
pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.usefixtures("slurm"),
    pytest.mark.timeout(300),
]


@pytest.mark.quick
def test_a_job_comes_back_without_every_node_that_cannot_start_python(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase $SLURMD_NODENAME in t1|t2) echo "no such library" >&2; exit 127 ;; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    run = Run(tmp_path, nodes=1, steps=6, python=str(python))
    for node in ("t1", "t2"):
        run.until(
            rf"PENDING .* after the batch process could not be started on {node} \(code 127", 60
        )
        control.requeue(run.directory)
    run.until("DONE after 1 attempt", 60)
    assert attempts(run.directory)[0].nodes == ["t3"]
    assert not (run.directory / "slurm/undecided").exists()


@pytest.mark.quick
def test_the_submitters_environment_does_not_ride_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OF_THE_SUBMITTER", "1")
    monkeypatch.setenv("PYTHONPATH", f"/nowhere:{ROOT}")
    look = "env >env-$SLURM_JOB_ID; pwd >>env-$SLURM_JOB_ID; false"
    work = tmp_path / "work; $(touch pwned) %j"
    work.mkdir()
    monkeypatch.chdir(work)
    check = f'pairs: false, command: "{look}"'
    run = Run(tmp_path, nodes=1, steps=6, check=check, more="caps: {node_exclusions: 0}")
    run.until("NOT IN THE QUEUE|GIVEN UP", 60)
    seen = (work / f"env-{run.numbers[0]}").read_text().splitlines()
    known = dict(line.split("=", 1) for line in seen if "=" in line)
    assert "OF_THE_SUBMITTER" not in known
    assert known["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    assert known["PYTHONPATH"] == str(ROOT) and known["HOME"] == os.path.expanduser("~")
    assert known["PRETEND_STEPS"] == "6"  # the site's own
    assert seen[-1] == str(work) and not list(tmp_path.rglob("pwned"))


def test_a_script_of_an_older_version_ends_in_one_line_and_the_run_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path, nodes=2, steps=40)
    run.until("RUNNING .* step [1-9]")
    control.stop(run.directory)
    run.until("STOPPED with code 75")
    text = (ROOT / "tests/launch/older_batch.sh").read_text()
    facts = {"NODES": "2", "RUN": str(run.directory), "WORK": str(ROOT), "PYTHON": sys.executable}
    for name, value in facts.items():
        text = text.replace(f"@{name}@", value)
    script = run.directory / "slurm/batch.sh"
    script.write_text(text)
    known, stopped = read_records(run.directory), run.status
    with pytest.raises(
        ConfigError, match=r"written by megahybrid 0\.1.*`megahybrid launch submit`"
    ):
        control.requeue(run.directory)
    assert (read_records(run.directory), run.status) == (known, stopped)
    assert not control.queued(run.directory)

    # One that was in the queue when megahybrid was replaced.
    number = slurm_commands.sbatch(str(script))
    log = run.directory / f"logs/{number}.batch.log"
    until(lambda: log.exists() and "megahybrid" in log.read_text(), "a line", 60)
    until(lambda: number not in slurm_commands.queue(), "its end", 60)
    (line,) = log.read_text().splitlines()
    assert line.startswith("megahybrid: this batch script was written before megahybrid 0.2")
    assert "megahybrid launch submit" in line
    assert (read_records(run.directory), run.status) == (known, stopped)
    assert not (run.directory / "slurm/undecided").exists()

    run.submit_again()
    assert (run.directory / "slurm/batch.1.sh").read_text() == text
    begun = run.until("RUNNING .*try 1 .* step age")
    assert "no ckpt" not in begun
    begins = [line for line in read_records(run.directory) if line["event"] == "start"]
    assert len(begins) == 2 and begins[1]["checkpoint"] is not None
    slurm_commands.warn(control.queued(run.directory)[0].job)
    run.start_now()
    run.until("DONE after 3 attempts", 90)
    assert run.codes() == [75, 75, 0]


@pytest.mark.parametrize("phase", ["preparing", "step [1-9]"])
def test_a_cancelled_run_is_one_outcome_with_one_code(phase: str, tmp_path: Path) -> None:
    check = "pairs: false, command: 'sleep 5'" if phase == "preparing" else "pairs: false"
    run = Run(tmp_path, nodes=2, steps=60, check=check, chain=2)
    run.until(f"RUNNING .*{phase}", 60)
    until(lambda: attempts(run.directory), "an attempt", 30)
    control.cancel(run.directory)
    until(lambda: attempts(run.directory)[0].code is not None, "its end", 30)
    until(lambda: not control.queued(run.directory), "an empty queue", 30)
    assert "STOPPED with code 75: cancelled on request" in run.status
    said = {
        (line["code"], line["reason"])
        for line in read_records(run.directory)
        if line["event"] == "verdict"
    }
    assert said == {(75, "cancelled on request")}
    (one,) = attempts(run.directory)
    assert one.code == 75 and one.reason.startswith("cancelled on request")


def test_a_job_that_an_operator_ends_or_puts_back_while_preparing_has_not_failed(
    tmp_path: Path, cluster: Cluster
) -> None:
    run = Run(tmp_path, nodes=2, steps=8, check="pairs: false, command: 'sleep 5'")
    for number in range(1, 4):
        run.until(f"RUNNING .*try {number} .*preparing", 60)
        until(lambda n=number: len(attempts(run.directory)) == n, "an attempt", 30)
        cluster.call("scontrol", "requeue", run.numbers[0])
        line = run.until("PENDING .* after attempt", 60)
        assert "put back into the queue" in line, line
        control.requeue(run.directory)
    run.until("RUNNING .*try 4 .*preparing .* 3 interrupted by Slurm before", 60)
    until(lambda: len(attempts(run.directory)) == 4, "an attempt", 30)
    cluster.call("scancel", run.numbers[0])
    line = run.until("STOPPED", 60)
    assert "STOPPED with code 75: cancelled in Slurm" in line
    assert not any(one.failed or one.counts for one in attempts(run.directory))
