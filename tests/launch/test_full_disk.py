"""No room under the launcher's own files: one line, 74, and what was decided stays decided."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megahybrid.launch import attempt as attempts_module
from megahybrid.launch import slurm
from megahybrid.launch.policy import Outcome
from megahybrid.launch.records import attempts, record
from megahybrid.launch.supervise import Supervisor
from tests.launch.test_script import ROOT, _job

ASKS = 'case "$*" in *hostnames*) echo n1 ;; *show*) echo JobState=RUNNING Restarts=0 ;; '


def _supervise(run: Path, restart: int) -> subprocess.CompletedProcess[str]:
    """The batch process as the script starts it, on a disk that takes no byte more."""
    job = _job(run_directory=str(run), file=str(run / "slurm/job.json"), nodes=1, spares=0)
    (run / "slurm").mkdir(parents=True, exist_ok=True)
    Path(job.file).write_text(job.model_dump_json())
    programs = run / "bin"
    programs.mkdir(exist_ok=True)
    # It says what it was asked by folders' names: its files have no room either.
    for name, text in (
        ("scontrol", f'{ASKS}*) mkdir "{run}/did $*" ;; esac'),
        ("squeue", "exit 0"),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    facts = {"SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": str(restart), "SLURM_JOB_NODELIST": "n1"}
    full = os.environ | facts | {"PATH": f"{programs}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-B", "-m", "megahybrid.launch.supervise", job.file],
        env=full,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
        timeout=60,
    )


def _did(run: Path) -> list[str]:
    return sorted(path.name.removeprefix("did ") for path in run.glob("did *"))


def test_without_room_for_a_record_the_job_comes_back_with_74_and_one_line(tmp_path: Path) -> None:
    for restart in (0, 1):
        done = _supervise(tmp_path, restart)
        assert (done.returncode, done.stderr) == (74, ""), done
        first, second = done.stdout.splitlines()
        assert "attempts.jsonl could not be read or written (File too large)" in first
        assert "back into the queue (no room for our records)" in second
        assert _did(tmp_path) == ["requeue 5"]
        (tmp_path / "did requeue 5").rmdir()
    # As often as other failures in a row, though nothing could be written of those before.
    done = _supervise(tmp_path, 2)
    assert done.returncode == 74 and not _did(tmp_path)
    assert "given up: 3 attempts in a row could record nothing" in done.stdout


def test_attempts_that_were_recorded_begin_the_count_anew(tmp_path: Path) -> None:
    record(tmp_path, "start", job="5", attempt=40, nodes=["n1"], checkpoint=None)
    assert _supervise(tmp_path, 42).returncode == 74 and _did(tmp_path) == ["requeue 5"]


def test_a_full_batch_log_changes_no_code() -> None:
    code = "import sys\nfrom tests.launch.test_full_disk import said\nsys.exit(said())"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, cwd=ROOT, timeout=60)
    assert done.returncode == 75


def said() -> int:
    """A process that tells something, then ends with 75."""
    Supervisor(_job(), {"SLURM_JOB_ID": "5"}).log("something")
    return 75


@pytest.mark.parametrize(
    ("code", "again"), [(0, False), (2, False), (93, False), (75, True), (74, True)]
)
def test_an_end_that_cannot_be_recorded_is_decided_all_the_same(
    code: int, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "attempts.jsonl")

    supervisor, put_back = _begun(tmp_path, monkeypatch)
    monkeypatch.setattr(attempts_module, "record", full)
    assert supervisor._after(Outcome(code, "why")) == code
    assert put_back == (["5"] if again else [])
    assert attempts(tmp_path)[0].code is None


def test_no_room_while_nodes_are_looked_at_is_74_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded", "node-check.log")

    supervisor, put_back = _begun(tmp_path, monkeypatch)
    monkeypatch.setattr("megahybrid.launch.supervise.fit_nodes", full)
    assert supervisor._begun(["n1"]) == 74 and put_back == ["5"]
    (one,) = attempts(tmp_path)
    assert one.code == 74 and one.failed and "(Disk quota exceeded)" in one.reason


def _begun(run: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Supervisor, list[str]]:
    """An attempt that has begun, and the jobs that it puts back."""
    put_back: list[str] = []
    fields = {"JobState": "RUNNING", "Restarts": "0"}
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(slurm, "job_fields", lambda job: fields)
    monkeypatch.setattr(slurm, "queue", dict)
    monkeypatch.setattr(slurm, "requeue", put_back.append)
    record(run, "start", job="5", attempt=0, nodes=["n1"], checkpoint=None)
    job = _job(run_directory=str(run), nodes=1)
    return Supervisor(job, {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n1"}), put_back
