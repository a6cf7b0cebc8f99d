"""The batch process without a Slurm, a sleeping process in the place of srun."""

import json
import subprocess
from pathlib import Path

import pytest

from launch import attempt as attempts
from launch import slurm
from launch.attempt import Attempt
from launch.events import JobEvents
from launch.records import read_records, record
from launch.slurm import Queued
from launch.supervise import Supervisor
from launch.watch import RankWatch
from megahybrid.config.base import parse
from megahybrid.config.site import Site
from megahybrid.heartbeat import Beat, heartbeat_file
from tests.launch.test_script import _job


def _attempt(run: Path) -> Attempt:
    limits = dict.fromkeys(("start", "compile", "data", "step", "evaluate", "save"), 60)
    facts = {"name": "x", "time_limit": "60", "gpus_per_node": 0, "ranks_per_node": 2}
    site = parse(Site, facts | {"watchdog": {"silent": 0.5, "every": 0.1, "limits": limits}})
    job = _job(run_directory=str(run), site=site, nodes=1, spares=0)
    return Attempt(job, "7", 0, {"SLURM_JOB_ID": "7"})


@pytest.mark.parametrize("failed", [True, False], ids=["failed", "silent"])
def test_a_failed_rank_is_no_hang_where_srun_does_not_end_the_others(
    failed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun without its controller. The cause is the rank that failed, not those that wait."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(attempts, "KILL_SECONDS", 0.1)
    (tmp_path / "logs/7.0").mkdir(parents=True)
    for rank in range(2):
        beat = Beat(rank, "n1", 1, attempt="7.0", exit_code=7 if failed and rank else None)
        heartbeat_file(tmp_path, rank).parent.mkdir(exist_ok=True)
        heartbeat_file(tmp_path, rank).write_text(json.dumps(vars(beat)))
    srun = subprocess.Popen(["/bin/sleep", "60"])
    attempt = _attempt(tmp_path)
    said = RankWatch(attempt, JobEvents(attempt)).until_end(srun)
    assert srun.poll() is not None
    assert said is None if failed else "ranks 0, 1 gave no sign" in said


def test_a_second_job_submitted_by_hand_does_not_start_beside_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, "start", job="6", attempt=0, nodes=["n1"], checkpoint=None)
    job = _attempt(tmp_path).job
    state = {"6": Queued("6", "6", "RUNNING", "None", "n1", "1:00", "6", "x")}
    monkeypatch.setattr(slurm, "queue", lambda: state)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert Supervisor(job, {"SLURM_JOB_ID": "7"}).go() == 2
    assert len(read_records(tmp_path)) == 1
