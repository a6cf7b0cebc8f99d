"""`megahybrid launch stop`, `cancel`, `save` and `requeue`."""

import contextlib
from pathlib import Path

from megahybrid.errors import ConfigError
from megahybrid.launch import slurm
from megahybrid.launch.job import DONE, FOLDER, SAVE_NOW, STOP_NOW, UNDECIDED, Job, read_job
from megahybrid.launch.records import jobs, record
from megahybrid.launch.script import is_of_version_0_1
from megahybrid.launch.slurm import QueuedJob, SlurmError

SETTLE_SECONDS = 5  # between a requeue and a start by hand


def job_of(run_directory: Path) -> Job:
    """Return the run's last submission. Raises ConfigError where there was none."""
    path = run_directory / FOLDER / "job.json"
    try:
        return read_job(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{run_directory} was never submitted ({path} cannot be read: {error}). Name the "
            "directory of a run that `megahybrid launch submit` has submitted."
        ) from None


def queued(run_directory: Path) -> list[QueuedJob]:
    """The run's jobs in the queue."""
    ours = set(jobs(run_directory))
    return [one for one in slurm.queue().values() if one.job in ours or one.array in ours]


def stop(run_directory: Path) -> str:
    """Save, then end, and do not come back. A job that has not begun is cancelled."""
    job_of(run_directory)
    (run_directory / STOP_NOW).write_text("stop\n")
    found = queued(run_directory)
    pending = [one.task for one in found if one.state == "PENDING"]
    slurm.cancel(pending, only_pending=True)
    running = [one for one in found if one.state == "RUNNING"]
    for one in running:
        with contextlib.suppress(SlurmError):  # the file alone does it too, at the next step
            slurm.warn(one.task)
    if running:
        return (
            f"job {running[0].task} saves and ends; see: megahybrid launch status {run_directory}"
        )
    if pending:
        record(
            run_directory,
            "verdict",
            job=jobs(run_directory)[-1],
            code=75,
            reason="stopped on request",
        )
        return f"job {', '.join(pending)} was waiting and is cancelled"
    return f"no job of {run_directory} is in the queue"


def save(run_directory: Path) -> str:
    """Write a checkpoint at the end of this step and go on."""
    job_of(run_directory)
    if not any(one.state == "RUNNING" for one in queued(run_directory)):
        return f"no job of {run_directory} is running: nothing is there to be saved"
    (run_directory / SAVE_NOW).write_text("save\n")
    return (
        f"a checkpoint will be written at the end of the step; {run_directory / SAVE_NOW} goes then"
    )


def cancel(run_directory: Path) -> str:
    """End every job of the run now. Ranks have the site's KillWait to save; `stop` waits for it."""
    job_of(run_directory)
    (run_directory / STOP_NOW).write_text("cancel\n")
    found = queued(run_directory)
    slurm.cancel([one.task for one in found])
    if not found:
        return f"no job of {run_directory} is in the queue"
    record(run_directory, "verdict", job=found[0].job, code=75, reason="cancelled on request")
    return f"job {', '.join(one.task for one in found)} cancelled"


def requeue(run_directory: Path) -> str:
    """Let a running job save and start again, start one that is held back, and submit the script of
    one that has ended again, with fresh counts of failures."""
    job = job_of(run_directory)
    if is_of_version_0_1(run_directory):
        raise ConfigError(
            f"{run_directory}/{FOLDER}/batch.sh was written by megahybrid 0.1, and this version "
            "cannot start it. Submit the run again: `megahybrid launch submit` with its run file "
            "goes on from its newest checkpoint."
        )
    if (run_directory / FOLDER / DONE).exists():
        raise ConfigError(
            f"{run_directory} is complete. Give the run more stages and submit it again."
        )
    (run_directory / STOP_NOW).unlink(missing_ok=True)
    found = queued(run_directory)
    running = [one for one in found if one.state == "RUNNING"]
    pending = [one for one in found if one.state == "PENDING"]
    if running:
        record(run_directory, "requeue", job=running[0].job)  # the counts begin anew
        slurm.warn(running[0].task)
        return f"job {running[0].task} saves and starts again"
    if pending:
        # In the second of its requeue a job has no valid credentials, and a start then ends it.
        start = f"StartTime=now+{SETTLE_SECONDS}"
        slurm.call("scontrol", "update", f"JobId={pending[0].task}", start)
        return f"job {pending[0].task} may start in {SETTLE_SECONDS} s"
    if found:
        raise ConfigError(
            f"job {found[0].task} of {run_directory} is {found[0].state}. Wait until it has ended."
        )
    (run_directory / FOLDER / UNDECIDED).unlink(missing_ok=True)
    number = slurm.sbatch(str(run_directory / FOLDER / "batch.sh"))
    record(
        run_directory,
        "submit",
        jobs=[number],
        nodes=job.nodes,
        spares=job.spares,
        chain=1,
        site=job.site.name,
        commit=job.commit,
    )
    return f"submitted again as job {number}"
