"""The batch process of a job: `python -m launch.supervise RUN/slurm/job.json`.

One attempt: look at the nodes (launch/fit_nodes.py), start the ranks, watch them (launch/watch.py),
keep their exit code, and put the job back into the queue where that is right (launch/policy.py).
Slurm starts the attempt after that as a new process. Every decision is one line in slurm/
attempts.jsonl and in the batch log.
"""

import contextlib
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launch import slurm
from launch.attempt import Attempt
from launch.fit_nodes import fit_nodes
from launch.job import DECIDED, DONE, FOLDER, STOP_NOW, UNDECIDED, Job, read_job
from launch.policy import Decision, Outcome, decide, first_ended, outcome
from launch.records import attempts, jobs, ledger_tail, newest_checkpoint
from launch.slurm import SlurmError
from launch.step import hostfile, hostfile_text, train_step
from launch.watch import RankWatch, user_stop
from megahybrid.errors import (
    EXIT_DO_NOT_RESTART,
    EXIT_DONE,
    EXIT_RESUME,
    EXIT_USER_MISTAKE,
    MegahybridError,
)
from megahybrid.heartbeat import clear, remove_empty_stacks

LOCK = "owner.lock"
_ILL = ("down", "drain", "fail")  # in the words of a node's state


class Supervisor:
    """One attempt of one job."""

    def __init__(self, job: Job, environment: Mapping[str, str]) -> None:
        restart = int(environment.get("SLURM_RESTART_COUNT", "0"))
        self.attempt = Attempt(job, environment["SLURM_JOB_ID"], restart, environment)
        self.job, self.run, self.number = job, job.directory, self.attempt.number
        self.tell = self.attempt.tell
        self.signals: list[str] = []  # what Slurm or a person sent us
        self.watch = RankWatch(self.attempt, self.signals)

    def go(self) -> int:
        """The attempt, from its first look to its exit code."""
        code = self._go()
        self.attempt.logs.mkdir(parents=True, exist_ok=True)
        (self.attempt.logs / DECIDED).touch()
        return code

    def _go(self) -> int:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)
        if (self.run / FOLDER / DONE).exists():
            self.tell("the run is complete: nothing to do")
            self._end_chain()
            return EXIT_DONE
        if user_stop(self.attempt):
            self.tell(f"{self.run / STOP_NOW} is there: not started")
            self._end_chain()
            return EXIT_RESUME
        if (other := self._held_by()) is not None:
            self.tell(f"job {other} is at work in {self.run}: not started beside it")
            return EXIT_USER_MISTAKE
        self.attempt.logs.mkdir(parents=True, exist_ok=True)
        nodes = slurm.hostnames(self.attempt.environment["SLURM_JOB_NODELIST"])
        self._explain_lost()
        self._release_lock()
        if user_stop(self.attempt) is None:  # one that came meanwhile is for this attempt
            (self.run / STOP_NOW).unlink(missing_ok=True)
        clear(self.run)
        self.attempt.record(
            "start",
            attempt=self.attempt.restart,
            nodes=nodes,
            checkpoint=newest_checkpoint(self.run),
        )
        (self.run / FOLDER / UNDECIDED).unlink(missing_ok=True)  # from here on the records count
        if (idle := self._lost_in_a_row()) is not None:
            return self._give_up(idle)
        self.tell(f"job {self.number}, attempt {self.attempt.restart + 1}, on {' '.join(nodes)}")
        try:
            good, bad = fit_nodes(self.attempt, nodes)
            if len(good) < self.job.nodes:
                return self._without_nodes(bad)
            ended = self._train(good[: self.job.nodes])
        except (OSError, MegahybridError) as error:
            ended = Outcome(1, f"the launcher failed: {error}")
        return self._after(ended)

    # What Slurm tells us. A handler only notes; the watch acts.
    def _note(self, number: int, _frame: object) -> None:
        self.signals.append(signal.Signals(number).name)

    def _held_by(self) -> str | None:
        """Another job, submitted by hand perhaps, whose ranks are at work on this run."""
        with contextlib.suppress(SlurmError):
            for one in attempts(self.run)[-1:]:
                found = slurm.queue().get(one.job) if one.ended is None else None
                if one.job != self.number and found and found.state == "RUNNING":
                    return one.job
        return None

    def _lost_in_a_row(self) -> int | None:
        """How many attempts ended without a word and without a checkpoint, where that is too many:
        nobody was left to count them."""
        history = attempts(self.run, since_submit=True)[:-1]
        found = itertools.takewhile(
            lambda one: one.code is None and not one.progressed, reversed(history)
        )
        number = sum(1 for _ in found)
        return number if number >= self.job.site.caps.without_checkpoint else None

    def _give_up(self, lost: int) -> int:
        reason = (
            f"no new checkpoint in {lost} attempts whose batch process was lost "
            f"(caps.without_checkpoint={self.job.site.caps.without_checkpoint})"
        )
        ended = Outcome(EXIT_DO_NOT_RESTART, reason)
        self._record_end(ended)
        self.tell(f"given up: {reason}")
        self.attempt.record("verdict", code=ended.code, reason=reason)
        self._end_chain()
        return ended.code

    def _explain_lost(self) -> None:
        """An attempt that wrote no end was lost: say which of its nodes are not well."""
        before = attempts(self.run)
        if not before or before[-1].code is not None:
            return
        for node, state in self._blame(before[-1].nodes).items():
            self.tell(f"the attempt before was lost: {node} is {state}")

    def _blame(self, nodes: Sequence[str]) -> dict[str, str]:
        """Those nodes that Slurm says are not well; they are recorded."""
        with contextlib.suppress(SlurmError):
            states = slurm.node_states(nodes)
            ill = {n: s for n, s in states.items() if any(w in s for w in _ILL)}
            for node, state in ill.items():
                self.attempt.record("bad_node", node=node, reason=state)
            return ill
        return {}

    def _release_lock(self) -> None:
        """Slurm runs one attempt of a job at a time: what an ended one held is free. From another
        machine the ranks could not know, and would wait for minutes."""
        path = self.run / LOCK
        with contextlib.suppress(OSError, ValueError, SlurmError):
            owner = json.loads(path.read_text()).get("job")
            if owner == self.number or (owner and owner not in slurm.queue()):
                self.tell(f"{path} was left by an attempt of job {owner} that is gone: removed")
                path.unlink()

    def _without_nodes(self, bad: Mapping[str, str]) -> int:
        """Too few nodes are left: come back on others, so many times at most."""
        names = ", ".join(f"{node} ({reason})" for node, reason in bad.items())
        before = sum(
            "bad node" in attempt.reason for attempt in attempts(self.run, since_submit=True)
        )
        if before >= self.job.site.caps.node_exclusions:
            ended = Outcome(1, f"bad node {names}; {before} requeues did not help")
            self._record_end(ended)
            self._end_chain()
            self.tell(f"given up: {ended.reason}")
            return 1
        ended = Outcome(EXIT_RESUME, f"bad node {names}")
        self._record_end(ended)
        excluded = sorted({*self.job.exclude, *self.job.site.exclude, *bad})
        return self._requeue(Decision(True, False, 1, ended.reason), exclude=excluded)

    def _train(self, nodes: Sequence[str]) -> Outcome:
        environment = self.attempt.step(nodes)
        if self.job.site.launcher == "deepspeed":
            Path(hostfile(environment)).write_text(hostfile_text(self.job, nodes))
        process = self.attempt.start(train_step(self.job, nodes, environment), nodes, "srun.log")
        hang = self.watch.until_end(process)
        remove_empty_stacks(self.attempt.logs)
        if hang is not None:
            return Outcome(137, hang)
        first = first_ended((self.attempt.logs / "srun.log").read_text(errors="replace"))
        code = _shell_code(process.returncode)
        return outcome(self.attempt.beats(), self.job.world_size, code, first)

    def _record_end(self, ended: Outcome) -> None:
        step = next((line["step"] for line in ledger_tail(self.run) if "step" in line), None)
        self.attempt.record(
            "end",
            attempt=self.attempt.restart,
            code=ended.code,
            step=step,
            checkpoint=newest_checkpoint(self.run),
            reason=ended.reason,
            node=ended.node,
        )

    def _after(self, ended: Outcome) -> int:
        if self.attempt.superseded:
            self.tell("another attempt has gone on with this run: nothing more is done here")
            return ended.code
        user = user_stop(self.attempt)
        if ended.code == EXIT_RESUME and (why := self._why_stopped()):
            ended = Outcome(ended.code, f"{ended.reason}: {why}", ended.node)
        self._record_end(ended)
        if not user:
            (self.run / STOP_NOW).unlink(missing_ok=True)
        decision = decide(
            ended,
            attempts(self.run, since_submit=True),
            self.job.site.caps,
            by_user=user,
            ended_by_slurm=self.watch.ended_by_slurm,
            time_is_up=self.watch.time_is_up,
            next_waits=self._next_waits(),
        )
        if decision.again:
            return self._requeue(decision)
        self.tell(f"ended with {decision.exit_code}: {decision.reason}")
        self.attempt.record("verdict", code=decision.exit_code, reason=decision.reason)
        if decision.exit_code == EXIT_DONE:
            (self.run / FOLDER / DONE).write_text(f"job {self.number}\n")
        if decision.end_chain:
            self._end_chain()
        return decision.exit_code

    def _why_stopped(self) -> str | None:
        if self.watch.ended_by_slurm:
            ill = self._blame(slurm.hostnames(self.attempt.environment["SLURM_JOB_NODELIST"]))
            if ill:
                return ", ".join(f"{node} is {state}" for node, state in ill.items())
        if self.watch.asked is not None:
            return self.watch.asked
        with contextlib.suppress(SlurmError):
            if slurm.job_fields(self.number).get("PreemptTime", "None") != "None":
                return "preempted"
        return None

    def _requeue(self, decision: Decision, exclude: Sequence[str] = ()) -> int:
        """Back into the queue. Slurm answers by ending this very process, which must live until it
        has also said which nodes it does not want: a running job's list cannot be changed."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.watch.ended_by_slurm and self._leaving():
            # Cancelled, or put back by Slurm itself: neither is ours to undo.
            self.tell(f"ended by Slurm ({decision.reason})")
            return decision.exit_code
        if self._waits():
            self.tell(f"Slurm has put the job back into the queue itself ({decision.reason})")
            return decision.exit_code
        self.tell(f"back into the queue ({decision.reason})")
        _often(lambda: slurm.requeue(self.number), self.tell)
        if exclude:
            _often(lambda: slurm.exclude(self.number, exclude), self.tell)
        return decision.exit_code

    def _leaving(self) -> bool:
        """Whether Slurm has ended the job already. In a preemption's grace time it still runs (and
        would count as complete if it left by itself); at its time limit nobody else requeues it."""
        if self.watch.time_limit is not None and time.monotonic() >= self.watch.time_limit:
            return False
        with contextlib.suppress(SlurmError):
            return slurm.job_fields(self.number).get("JobState") != "RUNNING"
        return False

    def _waits(self) -> bool:
        with contextlib.suppress(SlurmError):
            return slurm.job_fields(self.number).get("JobState") == "PENDING"
        return False

    def _next_waits(self) -> bool:
        with contextlib.suppress(SlurmError):
            return any(found.state == "PENDING" for found in self._others().values())
        return False

    def _others(self) -> dict[str, slurm.Queued]:
        ours = {*jobs(self.run)}
        return {
            number: found
            for number, found in slurm.queue().items()
            if number != self.number and (number in ours or found.array in ours)
        }

    def _end_chain(self) -> None:
        with contextlib.suppress(SlurmError):
            waiting = [found.task for found in self._others().values() if found.state == "PENDING"]
            if waiting:
                self.tell(f"cancelling {', '.join(waiting)}: not wanted any more")
                slurm.cancel(waiting)


def _often(action: Callable[[], None], tell: Callable[[str], None]) -> None:
    """A controller that is busy or restarting must not cost the run."""
    for pause in (1, 2, 5, 10, 20, 30, 60, *[300] * 12):  # an hour: it may be an upgrade
        try:
            action()
            return
        except SlurmError as error:
            tell(f"{error} Trying again in {pause} s.")
            time.sleep(pause)
    action()


def _shell_code(code: int) -> int:
    return code if code >= 0 else 128 - code


def main(arguments: Sequence[str]) -> int:
    """The entry of the batch script."""
    try:
        return Supervisor(read_job(Path(arguments[0])), dict(os.environ)).go()
    except MegahybridError as error:
        print(f"megahybrid: {error}", file=sys.stderr)
        return error.exit_code
    except (IndexError, KeyError, OSError) as error:
        print(f"megahybrid: no batch job of ours ({error!r}).", file=sys.stderr)
        return EXIT_USER_MISTAKE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
