"""The decision after an attempt: pure functions of how it ended and of what happened before."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from megahybrid.config.site import Caps
from megahybrid.errors import EXIT_DO_NOT_RESTART, EXIT_DONE, EXIT_RESUME, EXIT_USER_MISTAKE
from megahybrid.heartbeat import Beat, first_failure
from megahybrid.launch.interruption import Interruption
from megahybrid.launch.records import AttemptRecord

# What srun calls the end of a task by a signal, and the code a shell would give it.
SIGNALS = {
    "Killed": 137,
    "Segmentation fault": 139,
    "Bus error": 135,
    "Aborted": 134,
    "Terminated": 143,
}
_TASK_ENDED = re.compile(r"^srun: error: \S+: tasks? (\d+)[\d,-]*: ([A-Z][A-Za-z ]+)", re.MULTILINE)


def first_ended(srun_log: str) -> tuple[int, str] | None:
    """Return the rank that srun saw end badly before all others, and how.

    Those after it were ended by srun because of it.
    """
    found = _TASK_ENDED.search(srun_log)
    return (int(found[1]), found[2].strip()) if found else None


def task_ends(srun_log: str) -> dict[str, str]:
    """Return how srun says that the tasks of a node ended: Killed, Exited with exit code 127."""
    found = re.findall(r"^srun: error: (\S+): tasks? [\d,-]+: (.+)$", srun_log, re.MULTILINE)
    return {node: how.strip() for node, how in reversed(found)}


@dataclass(frozen=True)
class Outcome:
    """The end of an attempt's ranks: its code and its reason."""

    code: int
    reason: str
    node: str | None = None  # where it began, if that is known
    interruption: Interruption | None = None  # what Slurm or an operator did to it


@dataclass(frozen=True)
class Decision:
    """The batch process's next move. `exit_code` is what Slurm is told."""

    again: bool  # requeue this job
    end_chain: bool  # jobs of this run that still wait are not wanted any more
    exit_code: int
    reason: str


def outcome(
    beats: Mapping[int, Beat],
    world_size: int,
    srun_code: int,
    first: tuple[int, str] | None = None,
) -> Outcome:
    """Return the outcome of an attempt from what the ranks wrote at their ends.

    srun's own code shows a signal where one rank's failure made it kill the others. `first` is what
    `first_ended` returned.
    """
    ended = {rank: beat for rank, beat in beats.items() if beat.exit_code is not None}
    codes = {beat.exit_code for beat in ended.values()}
    if len(ended) == world_size and codes <= {EXIT_DONE, EXIT_RESUME}:
        code = EXIT_RESUME if EXIT_RESUME in codes else EXIT_DONE
        return Outcome(code, "done" if code == EXIT_DONE else "stopped and saved")
    # Ranks that stopped in order are no cause: another one did not get as far.
    failures = {rank: b for rank, b in ended.items() if b.exit_code not in (0, EXIT_RESUME)}
    cause = first_failure(failures)
    killed = [rank for rank in range(world_size) if rank in beats and rank not in ended]
    if cause is not None and (not cause.consequence or not killed):
        assert cause.exit_code is not None
        told = cause.message or f"code {cause.exit_code}"
        told = told if told.startswith("rank") else _of(cause) + told
        return Outcome(cause.exit_code, told, cause.host)
    if first is not None and first[0] in killed and first[1] in SIGNALS:
        rank, how = first
        beat = beats[rank]
        return Outcome(
            SIGNALS[how],
            f"rank {rank} on {beat.host} was ended from outside: {how} "
            f"(phase {beat.phase}, step {beat.step})",
            beat.host,
        )
    if killed:
        names = ", ".join(f"{rank} on {beats[rank].host}" for rank in killed[:4])
        phase = beats[killed[0]]
        return Outcome(
            _failure(srun_code),
            f"{'rank' if len(killed) == 1 else 'ranks'} {names} ended from outside "
            f"(phase {phase.phase}, step {phase.step})",
            phase.host,
        )
    if len(ended) == world_size:
        return Outcome(_failure(srun_code), f"srun ended with {srun_code}")
    return Outcome(_failure(srun_code), f"only {len(beats)} of {world_size} ranks began")


def _of(beat: Beat) -> str:
    return f"rank {beat.rank}: "


def _failure(code: int) -> int:
    """Return a code that says failure.

    Ranks that ended without a word were neither done nor saved.
    """
    return code if code not in (0, EXIT_USER_MISTAKE, EXIT_RESUME, EXIT_DO_NOT_RESTART) else 137


def interrupted(ended: Outcome, how: Interruption | None) -> Outcome:
    """Return the outcome of an attempt to which Slurm did `how`.

    Whatever its ranks died of, the run is to be resumed: a TERM can kill a rank that has no handler
    yet, its data workers, the nodes' check. What is certain stays: done, the user's mistake, do not
    restart.
    """
    if how is None or ended.code in (EXIT_DONE, EXIT_USER_MISTAKE, EXIT_DO_NOT_RESTART):
        return ended
    if ended.reason.startswith(how):
        return replace(ended, interruption=how)
    if ended.code == EXIT_RESUME:
        return replace(ended, reason=f"{ended.reason}: {how}", interruption=how)
    code = ended.code if how.counts else EXIT_RESUME
    return replace(ended, code=code, reason=f"{how} ({ended.reason})", interruption=how)


def decide(
    ended: Outcome,
    history: Sequence[AttemptRecord],
    caps: Caps,
    *,
    by_user: str | None = None,
    time_is_up: bool = False,
    next_waits: bool = False,
) -> Decision:
    """Return what comes after `ended`.

    `history` holds this submission's attempts, this one the last. `by_user`: "stopped" or
    "cancelled", where a person wanted that. `next_waits`: another job of the chain takes over. An
    attempt that left a newer checkpoint is never counted against a run (over weeks every run has
    many failures), nor is one that Slurm interrupted.
    """
    code = ended.code
    if code == EXIT_DONE:
        return Decision(False, True, code, "done")
    if code == EXIT_USER_MISTAKE:
        return Decision(False, True, code, f"not tried again: {ended.reason}")
    if code == EXIT_DO_NOT_RESTART:
        return Decision(False, True, code, f"not to be restarted: {ended.reason}")
    if by_user == "cancelled":  # the same, whatever the ranks were doing when they were ended
        return Decision(False, True, EXIT_RESUME, "cancelled on request")
    if by_user:
        return Decision(False, True, code, f"{by_user} on request")
    if ended.interruption is Interruption.CANCELLED:
        return Decision(False, False, EXIT_RESUME, ended.interruption)
    if ended.interruption is not None and not ended.interruption.counts:
        return Decision(True, False, code, ended.reason)
    idle = _in_a_row(history, lambda attempt: True)
    if idle >= caps.without_checkpoint:
        return Decision(
            False,
            True,
            EXIT_DO_NOT_RESTART,
            f"no new checkpoint in {idle} attempts (caps.without_checkpoint="
            f"{caps.without_checkpoint}); the last: {ended.reason}",
        )
    failures = _in_a_row(history, lambda attempt: attempt.failed)
    if code != EXIT_RESUME and failures >= caps.failures_in_a_row:
        return Decision(
            False,
            True,
            code,
            f"{failures} failures in a row (caps.failures_in_a_row={caps.failures_in_a_row}); "
            f"the last: {ended.reason}",
        )
    if code == EXIT_RESUME and time_is_up and next_waits:
        return Decision(False, False, code, "the time is up; the next job of the chain goes on")
    return Decision(True, False, code, ended.reason)


def lost_in_a_row(history: Sequence[AttemptRecord]) -> int:
    """Return how many attempts before this one ended without a word and without a checkpoint.

    Nobody was left to count them.
    """
    return _in_a_row(history, lambda attempt: attempt.code is None)


def _in_a_row(history: Sequence[AttemptRecord], which: Callable[[AttemptRecord], bool]) -> int:
    """Return how many of the newest attempts fulfil `which`; what Slurm did is passed over."""
    number = 0
    for attempt in reversed(history):
        if attempt.progressed:
            break
        if not attempt.counts:
            continue
        if not which(attempt):
            break
        number += 1
    return number
