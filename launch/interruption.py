"""The actions of Slurm or an operator on an attempt, told from Slurm's words by a pure function.

Any of it may come in any phase, also before there is a rank that could save. A run is to blame for
none of it but its time limit, and for nodes that are lost under it too often.
"""

from collections.abc import Mapping
from enum import StrEnum

from megahybrid.config.site import seconds_of

LIMIT_SLACK_SECONDS = 30.0  # Slurm's clock for time limits is that coarse
_ENDED = ("CANCELLED", "COMPLETING", "NODE_FAIL", "TIMEOUT")


class Interruption(StrEnum):
    """The reason why an attempt ended from outside; the value is what people are told."""

    PREEMPTED = "preempted"
    REQUEUED = "put back into the queue"
    CANCELLED = "cancelled in Slurm"
    ENDED = "ended by Slurm"  # which does not say why
    NODE_LOST = "a node was lost"
    TIME_LIMIT = "the time limit was reached"

    @property
    def counts(self) -> bool:
        """True where it counts against the run: too many of these in a row must end it."""
        return self in (Interruption.NODE_LOST, Interruption.TIME_LIMIT)


def interruption(
    fields: Mapping[str, str] | None,
    *,
    restart: int,
    terminated: bool,
    nodes_ill: bool = False,
    seconds_left: float | None = None,
) -> Interruption | None:
    """Return what happened to attempt number `restart` (from 0) of a job with these `fields`.

    `fields` are as `scontrol show job` names them; None where Slurm did not answer. `terminated`:
    the batch process got TERM; one that came before it could take any is in `fields` alone.
    `seconds_left`: until the time limit that the attempt began with; a preemption moves Slurm's own
    end time. Where Slurm preempts with a grace time, the steps get TERM and the batch process gets
    nothing.
    """
    fields = fields or {}
    if fields.get("JobState") == "PREEMPTED" or _preempted(fields, restart):
        return Interruption.PREEMPTED
    if not terminated and not ended(fields, restart):
        return None
    if nodes_ill or fields.get("JobState") == "NODE_FAIL":
        return Interruption.NODE_LOST
    if fields.get("JobState") == "TIMEOUT" or fields.get("Reason") == "TimeLimit":
        return Interruption.TIME_LIMIT
    if put_back(fields, restart):
        return Interruption.REQUEUED
    left = _seconds_left(fields) if seconds_left is None else seconds_left
    if left is not None and left < LIMIT_SLACK_SECONDS:
        return Interruption.TIME_LIMIT
    if fields.get("JobState") in ("CANCELLED", "COMPLETING"):
        return Interruption.CANCELLED
    return Interruption.ENDED


def ended(fields: Mapping[str, str], restart: int) -> bool:
    """Return whether Slurm says that it has ended attempt `restart`.

    Its batch process is still there to ask.
    """
    return fields.get("JobState") in _ENDED or put_back(fields, restart)


def put_back(fields: Mapping[str, str], restart: int) -> bool:
    """Return whether Slurm has put the job back into the queue since attempt `restart` began."""
    return fields.get("JobState") == "PENDING" or _restarts(fields) > restart


def _seconds_left(fields: Mapping[str, str]) -> float | None:
    try:
        return seconds_of(fields["TimeLimit"]) - seconds_of(fields["RunTime"])
    except (KeyError, ValueError):  # also UNLIMITED
        return None


def _preempted(fields: Mapping[str, str], restart: int) -> bool:
    """Return whether this start of the job was preempted, and not one before it."""
    when = fields.get("PreemptTime", "None")
    began = fields.get("StartTime", "")
    # Both are written as 2026-05-04T03:02:01, so text is in the order of time.
    return when[:1].isdigit() and (_restarts(fields) > restart or when >= began)


def _restarts(fields: Mapping[str, str]) -> int:
    number = fields.get("Restarts", "")
    return int(number) if number.isdigit() else 0
