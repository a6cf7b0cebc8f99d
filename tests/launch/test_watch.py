"""The batch process without a Slurm, a sleeping process in the place of srun."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from megahybrid.config.parsing import parse
from megahybrid.config.site import Site
from megahybrid.heartbeat import Beat, HangDetector, heartbeat_file
from megahybrid.launch import attempt as attempts
from megahybrid.launch import slurm
from megahybrid.launch.attempt import Attempt
from megahybrid.launch.events import JobEvents
from megahybrid.launch.records import read_records, record
from megahybrid.launch.slurm import QueuedJob
from megahybrid.launch.status import status_line
from megahybrid.launch.supervise import Supervisor
from megahybrid.launch.watch import END_BEFORE_LIMIT, RankWatch
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
    assert said is None if failed else "ranks 0, 1 sent no heartbeat" in said


def _hung(run: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[JobEvents, subprocess.Popen]:
    """Ranks that give signs of life and never stop, and no Slurm that answers."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(attempts, "KILL_SECONDS", 0.1)
    monkeypatch.setattr(HangDetector, "judge", lambda *_: None)
    monkeypatch.setattr("megahybrid.launch.watch.STACKS_SECONDS", 0.0)
    (run / "logs/7.0").mkdir(parents=True)
    return JobEvents(_attempt(run)), subprocess.Popen(["/bin/sleep", "60"])


def test_ranks_that_do_not_stop_are_ended_before_the_time_limit_ends_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the limit Slurm kills whoever would put the job back."""
    events, srun = _hung(tmp_path, monkeypatch)
    events.time_limit = time.monotonic() + END_BEFORE_LIMIT + 1
    assert RankWatch(events.attempt, events).until_end(srun) == (
        "hang: not stopped before the time limit"
    )
    assert events.seconds_left > END_BEFORE_LIMIT - 4 and srun.poll() is not None


def test_a_time_limit_that_was_cut_is_read_again_when_slurm_warns_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, srun = _hung(tmp_path, monkeypatch)
    events.time_limit = time.monotonic() + 5000
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + END_BEFORE_LIMIT + 1))
    fields = {"JobState": "RUNNING", "EndTime": end, "Restarts": "0"}
    monkeypatch.setattr(slurm, "job_fields", lambda job: fields)
    events.signals.append("SIGUSR1")
    told = RankWatch(events.attempt, events).until_end(srun)
    assert told == "hang: not stopped before the time limit"


def test_at_the_time_limit_nobody_waits_for_ranks_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, srun = _hung(tmp_path, monkeypatch)
    events.signals.append("SIGTERM")
    fields = {"JobState": "TIMEOUT", "Restarts": "0"}
    monkeypatch.setattr(slurm, "job_fields", lambda job: fields)
    began = time.monotonic()
    assert RankWatch(events.attempt, events).until_end(srun) == "the time limit was reached"
    assert time.monotonic() < began + 10 and srun.poll() is not None


@pytest.mark.parametrize(("word", "told"), [("stop", "stopped"), ("cancel", "cancelled")])
def test_a_run_that_was_stopped_before_its_process_began_is_told_as_stopped(
    word: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("signal.signal", lambda *_: None)
    record(tmp_path, "submit", jobs=["7"], nodes=1)
    (tmp_path / "stop-now").write_text(f"{word}\n")
    assert Supervisor(_attempt(tmp_path).job, {"SLURM_JOB_ID": "7"}).supervise() == 75
    line = status_line(tmp_path, {})
    assert line == f"{tmp_path.name}: STOPPED with code 75: {told} on request"


def test_a_second_job_submitted_by_hand_does_not_start_beside_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, "start", job="6", attempt=0, nodes=["n1"], checkpoint=None)
    job = _attempt(tmp_path).job
    state = {"6": QueuedJob("6", "6", "RUNNING", "None", "n1", "1:00", "6", "x")}
    monkeypatch.setattr(slurm, "queue", lambda: state)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert Supervisor(job, {"SLURM_JOB_ID": "7"}).supervise() == 2
    assert len(read_records(tmp_path)) == 1
