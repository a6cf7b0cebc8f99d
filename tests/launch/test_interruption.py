"""Everything that Slurm or an operator can do to an attempt, in every phase of it, against the
policy: what is counted, what comes back, what is told. Slurm's words were taken down from 22.05."""

from dataclasses import dataclass

import pytest

from megahybrid.config.site import Caps
from megahybrid.heartbeat import Beat
from megahybrid.launch.interruption import Interruption, interruption
from megahybrid.launch.policy import Decision, Outcome, decide, first_ended, interrupted, outcome
from megahybrid.launch.records import AttemptRecord

CAPS = Caps(failures_in_a_row=3, without_checkpoint=3)
RUNNING = {
    "JobState": "RUNNING",
    "Reason": "None",
    "PreemptTime": "None",
    "StartTime": "2026-05-04T10:20:29",
    "RunTime": "00:00:20",
    "TimeLimit": "01:00:00",
    "Restarts": "0",
}
ENDING = RUNNING | {"JobState": "COMPLETING"}
PUT_BACK = ENDING | {"Restarts": "1", "StartTime": "2026-05-04T10:20:57"}


@dataclass(frozen=True)
class Event:
    """What Slurm says of the job then, and what reaches the batch process."""

    fields: dict[str, str] | None
    terminated: bool = True
    nodes_ill: bool = False
    seconds_left: float = 3000.0
    how: Interruption | None = None
    again: bool = True


EVENTS = {
    "nothing": Event(RUNNING, terminated=False),
    # The steps get TERM; the batch process hears nothing until the grace time is over.
    "preempted-with-grace": Event(
        RUNNING | {"PreemptTime": "2026-05-04T10:20:33", "RunTime": "00:59:59"},
        terminated=False,
        how=Interruption.PREEMPTED,
    ),
    "grace-time-over": Event(
        ENDING | {"PreemptTime": "2026-05-04T10:20:33"}, how=Interruption.PREEMPTED
    ),
    "preempted-without-grace": Event(PUT_BACK, how=Interruption.REQUEUED),
    "preempted-and-cancelled": Event(
        RUNNING | {"JobState": "PREEMPTED"}, how=Interruption.PREEMPTED
    ),
    "put-back-by-an-operator": Event(PUT_BACK, how=Interruption.REQUEUED),
    "put-back-and-waiting": Event(
        PUT_BACK | {"JobState": "PENDING", "Reason": "BeginTime"}, how=Interruption.REQUEUED
    ),
    "scancel": Event(ENDING, how=Interruption.CANCELLED, again=False),
    "scancel-and-gone": Event(
        RUNNING | {"JobState": "CANCELLED"}, how=Interruption.CANCELLED, again=False
    ),
    "a-node-lost": Event(PUT_BACK, nodes_ill=True, how=Interruption.NODE_LOST),
    "time-limit": Event(ENDING, seconds_left=-3.0, how=Interruption.TIME_LIMIT),
    "time-limit-said": Event(
        RUNNING | {"JobState": "TIMEOUT", "Reason": "TimeLimit"}, how=Interruption.TIME_LIMIT
    ),
    # TERM came before the batch process could take it.
    "put-back-unheard": Event(PUT_BACK, terminated=False, how=Interruption.REQUEUED),
    "scancel-unheard": Event(ENDING, terminated=False, how=Interruption.CANCELLED, again=False),
    "a-node-lost-unheard": Event(
        PUT_BACK, terminated=False, nodes_ill=True, how=Interruption.NODE_LOST
    ),
    "time-limit-unheard": Event(
        ENDING, terminated=False, seconds_left=-3.0, how=Interruption.TIME_LIMIT
    ),
    "TERM-by-hand": Event(RUNNING, how=Interruption.ENDED),
    "TERM-and-no-answer": Event(None, how=Interruption.ENDED),
    # Of the start before this one.
    "preempted-once-before": Event(
        RUNNING | {"PreemptTime": "2026-05-04T09:00:00"}, terminated=False
    ),
}


def _ranks(phase: str, step: int, *codes: int | None) -> dict[int, Beat]:
    return {
        rank: Beat(rank, f"n{rank}", 1, phase=phase, step=step, exit_code=code)
        for rank, code in enumerate(codes)
    }


TERMINATED = "srun: error: n0: task 0: Terminated\n"
WORKER = "DataLoader worker (pid 7) is killed by signal: Terminated."
# How an attempt ends in each phase if TERM comes to its processes then.
PHASES = {
    "batch-process-starting": Outcome(75, "stopped while nodes were checked"),
    "node-check": Outcome(1, "the launcher failed: no node could be checked"),
    "pair-check": Outcome(1, "the launcher failed: no pair of nodes answered"),
    "ranks-starting": outcome({}, 2, 143),
    "ranks-half-there": outcome(_ranks("start", 0, None), 2, 143, first_ended(TERMINATED)),
    "start": outcome(_ranks("start", 0, None, None), 2, 143, first_ended(TERMINATED)),
    "start-handled-by-one": outcome(_ranks("start", 0, 75, None), 2, 143),
    "compile": outcome(_ranks("compile", 0, 75, 75), 2, 75),
    "training": outcome(_ranks("step", 40, 75, 75), 2, 75),
    "a-data-worker-died": outcome({0: Beat(0, "n0", 1, exit_code=1, message=WORKER)}, 2, 143),
    "saving-and-killed": outcome(_ranks("save", 41, None, None), 2, 137),
    "ending-saved": outcome(_ranks("save", 41, 75, 75), 2, 75),
    "hung": Outcome(137, "hang: rank 1 sent no heartbeat for 120 s"),
}


def _end(phase: str, event: str) -> Outcome:
    at = EVENTS[event]
    how = interruption(
        at.fields,
        restart=0,
        terminated=at.terminated,
        nodes_ill=at.nodes_ill,
        seconds_left=at.seconds_left,
    )
    assert how is at.how
    return interrupted(PHASES[phase], how)


def _record(ended: Outcome, **facts) -> AttemptRecord:
    return AttemptRecord("1", 0, code=ended.code, interruption=ended.interruption, **facts)


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("phase", PHASES)
def test_what_slurm_does_in_any_phase_is_never_counted(phase: str, event: str) -> None:
    ended = _end(phase, event)
    how = EVENTS[event].how
    many = [_record(ended)] * 50
    decision = decide(ended, many, CAPS, next_waits=True)
    if how is None or how.counts:
        assert ended.code == PHASES[phase].code and _record(ended).counts
        assert decide(ended, [_record(ended)] * 2, CAPS, next_waits=True).again
        assert not decision.again and decision.end_chain
        return
    assert ended.code == 75 and how in ended.reason
    assert PHASES[phase].reason in ended.reason  # what the ranks died of is told all the same
    assert not _record(ended).failed and not _record(ended).counts
    assert decision.again is EVENTS[event].again and not decision.end_chain
    assert decision.exit_code == 75


@pytest.mark.parametrize("event", [name for name, at in EVENTS.items() if at.how and at.again])
def test_what_is_certain_stays_whatever_slurm_does(event: str) -> None:
    for code in (0, 2, 93):
        how = EVENTS[event].how
        ended = interrupted(Outcome(code, "why"), how)
        assert ended == Outcome(code, "why")
        assert not decide(ended, [_record(ended)], CAPS).again


def test_interruptions_between_failures_neither_count_nor_wash_them_away() -> None:
    away = AttemptRecord("1", 0, code=75, interruption=Interruption.PREEMPTED)
    failed = AttemptRecord("1", 0, code=7)
    decision = decide(Outcome(7, "why"), [failed, away, failed, away, away, failed], CAPS)
    assert not decision.again and decision.reason.startswith("no new checkpoint in 3 attempts")
    assert decide(Outcome(7, "why"), [failed, *[away] * 9, failed], CAPS).again
    saved = AttemptRecord(
        "1", 0, code=75, interruption=Interruption.PREEMPTED, checkpoint_before=1, checkpoint=9
    )
    assert decide(Outcome(7, "why"), [failed, failed, saved, failed], CAPS).again


def test_a_person_who_cancels_is_heard_over_slurm() -> None:
    ended = _end("node-check", "scancel")
    decision = decide(ended, [_record(ended)], CAPS, by_user="cancelled")
    assert decision == Decision(False, True, 75, "cancelled on request")


def test_a_preempted_job_comes_back_itself_also_where_the_next_of_its_chain_waits() -> None:
    ended = _end("training", "preempted-with-grace")
    decision = decide(ended, [_record(ended)], CAPS, time_is_up=True, next_waits=True)
    assert decision.again and not decision.end_chain
