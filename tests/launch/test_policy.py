"""What comes after an attempt, for every way it can end."""

import pytest

from megahybrid.config.site import Caps
from megahybrid.heartbeat import Beat
from megahybrid.launch.policy import Decision, Outcome, decide, first_ended, outcome
from megahybrid.launch.records import AttemptRecord

CAPS = Caps(failures_in_a_row=3, without_checkpoint=4)


def _attempt(code: int | None, before: int | None = None, after: int | None = None):
    return AttemptRecord("1", 0, code=code, checkpoint_before=before, checkpoint=after)


def _beat(
    rank: int, code: int | None = None, message: str | None = None, consequence=False
) -> Beat:
    return Beat(rank, f"n{rank}", 1, exit_code=code, message=message, consequence=consequence)


def _decide(code: int, *history: AttemptRecord, **more):
    return decide(Outcome(code, "why"), [*history, _attempt(code)], CAPS, **more)


def test_a_complete_run_ends_its_chain() -> None:
    decision = _decide(0)
    assert (decision.again, decision.end_chain, decision.exit_code) == (False, True, 0)


@pytest.mark.parametrize("code", [2, 93])
def test_codes_2_and_93_are_never_tried_again(code: int) -> None:
    decision = _decide(code, next_waits=True, time_is_up=True)
    assert (decision.again, decision.end_chain, decision.exit_code) == (False, True, code)


@pytest.mark.parametrize("code", [75, 1, 137, 7])
def test_a_stop_and_a_failure_come_back(code: int) -> None:
    assert _decide(code).again


def test_a_stop_that_a_person_wanted_stays_one() -> None:
    decision = _decide(75, by_user="stopped")
    assert (decision.again, decision.end_chain) == (False, True)


def test_at_the_time_limit_the_next_job_of_a_chain_takes_over() -> None:
    decision = _decide(75, next_waits=True, time_is_up=True)
    assert (decision.again, decision.end_chain) == (False, False)
    assert _decide(75, time_is_up=True).again


def test_failures_in_a_row_are_given_up_with_their_own_code() -> None:
    decision = _decide(7, _attempt(1), _attempt(None))
    assert not decision.again and decision.end_chain and decision.exit_code == 7
    assert decision.reason.startswith("3 failures in a row (caps.failures_in_a_row=3)")


def test_a_failure_after_a_new_checkpoint_is_not_counted() -> None:
    assert _decide(7, _attempt(1), _attempt(1, before=10, after=20)).again
    # Over weeks there are many failures, each after hours of work.
    assert decide(
        Outcome(1, "why"), [_attempt(1, before=n, after=n + 10) for n in range(0, 900, 10)], CAPS
    ).again


def test_no_new_checkpoint_in_n_attempts_is_no_progress_whatever_the_codes() -> None:
    decision = _decide(75, *[_attempt(75, before=10, after=10)] * 3)
    assert (decision.again, decision.exit_code) == (False, 93)
    assert "no new checkpoint in 4 attempts" in decision.reason


def test_74_is_tried_again_and_counts_under_the_caps() -> None:
    assert _decide(74).again and _decide(74, _attempt(74)).again
    decision = _decide(74, _attempt(74), _attempt(74))
    assert (decision.again, decision.end_chain, decision.exit_code) == (False, True, 74)
    assert decision.reason.startswith("3 failures in a row")
    full = "x could not be written (No space left on device)"
    assert outcome({0: _beat(0, 74, full), 1: _beat(1, 1, "Connection reset", True)}, 2, 143) == (
        Outcome(74, f"rank 0: {full}", "n0")
    )


def test_a_cancelled_run_has_one_outcome_whatever_its_ranks_did() -> None:
    found = {_decide(code, by_user="cancelled") for code in (75, 143, 137, 7, 1, 74)}
    assert found == {Decision(False, True, 75, "cancelled on request")}


def test_all_ranks_stopped_is_75_and_all_done_is_0() -> None:
    assert outcome({0: _beat(0, 75), 1: _beat(1, 75)}, 2, 75).code == 75
    assert outcome({0: _beat(0, 0), 1: _beat(1, 0)}, 2, 0).code == 0


def test_the_cause_wins_over_its_consequences_and_over_srun() -> None:
    beats = {0: _beat(0, 1, "Connection closed by peer", True), 1: _beat(1, 93, "rank 1: audit")}
    assert outcome(beats, 2, 143) == Outcome(93, "rank 1: audit", "n1")


def test_a_rank_that_ended_without_a_word_was_killed() -> None:
    found = outcome({0: _beat(0, 1, "Connection reset", True), 1: _beat(1)}, 2, 137)
    assert found.code == 137 and found.reason.startswith("rank 1 on n1 ended from outside")


@pytest.mark.parametrize("srun", [0, 2, 75, 93])
def test_ranks_that_never_began_are_a_failure_whatever_srun_says(srun: int) -> None:
    assert outcome({}, 4, srun) == Outcome(137, "only 0 of 4 ranks began")


def test_a_stop_is_none_where_a_rank_did_not_get_there() -> None:
    assert outcome({0: _beat(0, 75), 1: _beat(1)}, 2, 137).code == 137


SRUN_LOG = """srun: Job 5 step creation temporarily disabled, retrying (Requested nodes are busy)
srun: error: n2: task 3: Killed
srun: launch/slurm: _step_signal: Terminating StepId=5.2
srun: error: n2: task 2: Terminated
srun: error: n1: tasks 0-1: Killed
"""


def test_of_ranks_that_all_ended_from_outside_the_first_is_named() -> None:
    assert first_ended(SRUN_LOG) == (3, "Killed")
    assert first_ended("srun: error: n1: tasks 0-3: Exited with exit code 1\n") == (
        0,
        "Exited with exit code",
    )
    assert first_ended("") is None
    beats = {rank: _beat(rank) for rank in range(4)}
    found = outcome(beats, 4, 143, (3, "Killed"))
    assert (found.code, found.node) == (137, "n3")
    assert found.reason == "rank 3 on n3 was ended from outside: Killed (phase start, step 0)"
