"""Slurm's own commands, as functions. Arguments are lists: no shell reads them."""

import contextlib
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from megahybrid.errors import MegahybridError

TIMEOUT_SECONDS = 60
# Variables in which people keep options of these commands: they would change what is submitted (all
# of it is in the script), and what squeue shows.
_OPTIONS = ("SBATCH_", "SCANCEL_", "SQUEUE_", "SINFO_", "SACCT_", "SLURM_TIME_FORMAT")
# Of a job or rank that we may be part of.
_OF_A_JOB = (
    "SLURM_",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_",
    "TORCHELASTIC_",
    "MEGAHYBRID_",
)


class SlurmError(MegahybridError):
    """A Slurm command that failed, or that is not there."""


def call(*command: str, timeout: float = TIMEOUT_SECONDS) -> str:
    """The output of a command. Raises SlurmError with its last line of complaint."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",  # names of other jobs may be written in anything
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            env=_environment(submits=command[0] == "sbatch"),
        )
    except FileNotFoundError:
        raise SlurmError(
            f"{command[0]} is not installed on this machine. Submit from a login node of a "
            "cluster that runs Slurm, or see the script with --dry-run."
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{command[0]} did not answer in {timeout:.0f} s. See `scontrol ping`, then try again."
        ) from None
    if done.returncode:
        complaint = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise SlurmError(f"{' '.join(command[:2])} refused ({complaint}).")
    return done.stdout


def _environment(*, submits: bool) -> dict[str, str]:
    """Return our environment without options of Slurm's commands.

    A new job would take over the variables of one (an interactive one) it is submitted from: its
    count of restarts, its shape, where its ranks met.
    """
    others = _OF_A_JOB if submits else ()
    kept = ("SLURM_CONF", "SLURM_CLUSTERS")
    return {
        name: value
        for name, value in os.environ.items()
        if name in kept or not name.startswith((*_OPTIONS, *others))
    }


@dataclass(frozen=True)
class QueuedJob:
    """A job as the queue shows it."""

    job: str
    array: str  # the number of the array it belongs to; its own where there is none
    state: str  # PENDING, RUNNING, COMPLETING, …
    reason: str
    nodes: str
    left: str  # until the time limit, as Slurm writes it
    task: str  # as scancel names it: 12, or 12_3 of an array
    name: str
    restarts: int | None = None  # how often it was put back; None where that is not known


def queue() -> dict[str, QueuedJob]:
    """This user's jobs by number; ended ones leave it after some minutes, or at once."""
    # First the counts: a job is put back and COMPLETING at once, so that a state read after its
    # count is of this start or says that it has ended, and never RUNNING with the next one's count.
    restarts = _restarts()
    text = call("squeue", "-h", "-r", "-u", str(os.getuid()), "-o", "%A|%F|%T|%r|%N|%L|%i|%j")
    rows = [line.split("|", 7) for line in text.splitlines()]
    found = {}
    for job, array, state, reason, nodes, left, task, name in (
        row for row in rows if len(row) == 8
    ):
        known = restarts.get(job)
        state = "RUNNING" if state == "SIGNALING" else state  # what it is while a signal travels
        left = "0:00" if left == "INVALID" else left  # what it says when the time is over
        found[job] = QueuedJob(job, array, state, reason, nodes, left, task, name, known)
    return found


def _restarts() -> dict[str, int]:
    """Return the counts of restarts by job; squeue's short options do not know them."""
    words = ("-h", "-r", "-u", str(os.getuid()), "-O", "JobID:20,RestartCnt:20")
    rows: list[list[str]] = []
    with contextlib.suppress(SlurmError):
        rows = [line.split() for line in call("squeue", *words).splitlines()]
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}


def sbatch(script: str) -> str:
    """Submits a script; returns the job's number."""
    return call("sbatch", "--parsable", script).strip().split(";")[0]


def cancel(jobs: Sequence[str], *, signal: str | None = None, only_pending: bool = False) -> None:
    """Ends jobs or steps, or sends their ranks a signal."""
    options = [f"--signal={signal}"] if signal else []
    options += ["--state=PENDING"] if only_pending else []
    if jobs:
        call("scancel", *options, *jobs)


def warn(job: str) -> None:
    """Sends USR1 to the batch process of a job: stop in time."""
    call("scancel", "--batch", "--signal=USR1", job)


def steps(job: str) -> list[str]:
    """The numbered steps of a running job: 12.0, 12.1."""
    text = call("squeue", "-h", "-s", "-j", job, "-o", "%i")
    return [line.strip() for line in text.splitlines() if line.strip().rpartition(".")[2].isdigit()]


def requeue(job: str) -> None:
    """Puts a running or ended job back into the queue."""
    call("scontrol", "requeue", job)


def exclude(job: str, nodes: Sequence[str]) -> None:
    """Keeps a pending job off some nodes."""
    call("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}")


def hostnames(node_list: str) -> list[str]:
    """Return the names of a node list: n[1-3] as n1, n2, n3."""
    return call("scontrol", "show", "hostnames", node_list).split() if node_list else []


def job_fields(job: str) -> dict[str, str]:
    """Everything `scontrol show job` says, by its own names."""
    words = call("scontrol", "-o", "show", "job", job).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def final_state(job: str) -> str | None:
    """Return how Slurm says that an ended job ended.

    For some minutes it still knows, and with an accounting database for ever.
    """
    with contextlib.suppress(SlurmError, KeyError):
        known = job_fields(job)
        return f"{known['JobState']}, code {known['ExitCode']}"
    with contextlib.suppress(SlurmError, ValueError):
        # -D: also the attempts before a requeue.
        rows = call("sacct", "-D", "-X", "-n", "-P", "-j", job, "-o", "State,ExitCode", timeout=10)
        for row in reversed(rows.splitlines()):
            state, code = row.split("|")
            return f"{state}, code {code}"
    return None


def node_states(nodes: Sequence[str]) -> dict[str, str]:
    """State and, where there is one, the reason an administrator gave."""
    if not nodes:
        return {}
    text = call("sinfo", "-h", "-N", "-n", ",".join(nodes), "-o", "%N|%T|%E")
    rows = [line.split("|", 2) for line in text.splitlines()]
    return {
        node: state if reason in ("none", "") else f"{state} ({reason})"
        for node, state, reason in rows
    }
