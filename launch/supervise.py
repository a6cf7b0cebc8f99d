"""The batch process of a job: `python -m megahybrid.launch.supervise RUN/slurm/job.json`.

One attempt: look at the nodes (launch/fit_nodes.py), start the ranks, watch them (launch/watch.py),
keep their exit code, and put the job back into the queue where that is right (launch/policy.py).
Slurm starts the attempt after that as a new process. Every decision is one line in slurm/
attempts.jsonl and in the batch log.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megahybrid.errors import (
    EXIT_DO_NOT_RESTART,
    EXIT_DONE,
    EXIT_RESUME,
    EXIT_STORAGE,
    EXIT_USER_MISTAKE,
    MegahybridError,
    StorageError,
    from_os_error,
)
from megahybrid.heartbeat import clear, remove_empty_stacks
from megahybrid.launch import slurm
from megahybrid.launch.attempt import Attempt
from megahybrid.launch.events import JobEvents, Stopped, user_stop
from megahybrid.launch.fit_nodes import fit_nodes
from megahybrid.launch.interruption import Interruption, put_back
from megahybrid.launch.job import BEGAN, DECIDED, DONE, FOLDER, STOP_NOW, UNDECIDED, Job, read_job
from megahybrid.launch.policy import (
    Decision,
    Outcome,
    decide,
    first_ended,
    interrupted,
    lost_in_a_row,
    outcome,
)
from megahybrid.launch.records import (
    AttemptRecord,
    attempts,
    jobs,
    newest_checkpoint,
    newest_ledger_lines,
)
from megahybrid.launch.slurm import SlurmError
from megahybrid.launch.step import hostfile, hostfile_text, train_step
from megahybrid.launch.watch import RankWatch

LOCK = "owner.lock"


class Supervisor:
    """One attempt of one job."""

    def __init__(self, job: Job, environment: Mapping[str, str]) -> None:
        restart = int(environment.get("SLURM_RESTART_COUNT", "0"))
        self.attempt = Attempt(job, environment["SLURM_JOB_ID"], restart, environment)
        self.job, self.run, self.number = job, job.directory, self.attempt.number
        self.log = self.attempt.log
        self.events = JobEvents(self.attempt)
        self.watch = RankWatch(self.attempt, self.events)

    def supervise(self) -> int:
        """Go through the attempt, from its first look to its exit code.

        Where its own files cannot be written that is one line and 74, and the job is put back so
        many times in a row at most.
        """
        self.events.listen()
        try:
            self._touch(BEGAN)  # the batch script takes a node that gets no further for a bad one
            code = self._supervise()
        except OSError as error:
            storage = from_os_error(error, began=True)
            if storage is None:
                raise
            return self._without_storage(storage)
        with contextlib.suppress(OSError):  # the code 74 is known to the script without it
            self._touch(DECIDED)
        return code

    def _touch(self, name: str) -> None:
        self.attempt.logs.mkdir(parents=True, exist_ok=True)
        (self.attempt.logs / name).touch()

    def _supervise(self) -> int:
        if (self.run / FOLDER / DONE).exists():
            self.log("the run is complete: nothing to do")
            self._end_chain()
            return EXIT_DONE
        if user := user_stop(self.attempt):
            self.log(f"{self.run / STOP_NOW} is there: not started")
            self.attempt.try_record("verdict", code=EXIT_RESUME, reason=f"{user} on request")
            self._end_chain()
            return EXIT_RESUME
        if (other := self._held_by()) is not None:
            self.log(f"job {other} is at work in {self.run}: not started beside it")
            return EXIT_USER_MISTAKE
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
        lost = lost_in_a_row(attempts(self.run, since_submit=True)[:-1])
        if lost >= self.job.site.caps.without_checkpoint:
            return self._give_up(lost)
        self.log(f"job {self.number}, attempt {self.attempt.restart + 1}, on {' '.join(nodes)}")
        return self._begun(nodes)

    def _begun(self, nodes: Sequence[str]) -> int:
        """Go on from the recorded start to what comes after its end."""
        try:
            self.events.begin()
            if self.events.signals or self.events.interruption is not None:
                self.events.check("its batch process started")
            good, bad = fit_nodes(self.attempt, nodes, self.events)
            if len(good) < self.job.nodes:
                return self._without_nodes(bad)
            self.events.check("ranks were about to start")
            ended = self._train(good[: self.job.nodes])
        except Stopped as stop:
            ended = Outcome(EXIT_RESUME, str(stop))
        except (OSError, MegahybridError) as error:
            known = from_os_error(error, began=True) if isinstance(error, OSError) else None
            code = EXIT_STORAGE if isinstance(known, StorageError) else 1
            ended = Outcome(code, f"the launcher failed: {known or error}")
        return self._after(ended)

    def _without_storage(self, error: MegahybridError) -> int:
        """Put the job back where nothing can be recorded.

        Only Slurm's count of restarts then tells how often.
        """
        before = [one.attempt for one in attempts(self.run) if one.job == self.number]
        failures = self.attempt.restart - max(before, default=-1)
        self.log(str(error))
        if failures >= self.job.site.caps.failures_in_a_row:
            cap = f"caps.failures_in_a_row={self.job.site.caps.failures_in_a_row}"
            self.log(f"given up: {failures} attempts in a row could record nothing ({cap})")
            self._end_chain()
            return error.exit_code
        return self._requeue(Decision(True, False, error.exit_code, "no room for our records"))

    def _held_by(self) -> str | None:
        """Return another job, submitted by hand perhaps, whose ranks are at work on this run."""
        with contextlib.suppress(SlurmError):
            for one in attempts(self.run)[-1:]:
                found = slurm.queue().get(one.job) if one.ended is None else None
                if one.job != self.number and found and found.state == "RUNNING":
                    return one.job
        return None

    def _give_up(self, lost: int) -> int:
        reason = (
            f"no new checkpoint in {lost} attempts whose batch process was lost "
            f"(caps.without_checkpoint={self.job.site.caps.without_checkpoint})"
        )
        ended = Outcome(EXIT_DO_NOT_RESTART, reason)
        self._record_end(ended)
        self.log(f"given up: {reason}")
        self.attempt.try_record("verdict", code=ended.code, reason=reason)
        self._end_chain()
        return ended.code

    def _explain_lost(self) -> None:
        """Say which nodes of a lost attempt are not well: one that wrote no end was lost."""
        before = attempts(self.run)
        if not before or before[-1].code is not None or not before[-1].counts:
            return
        for node, state in self._blame(before[-1].nodes).items():
            self.log(f"the attempt before was lost: {node} is {state}")

    def _blame(self, nodes: Sequence[str]) -> dict[str, str]:
        """Return those nodes that Slurm says are not well, and record them."""
        ill = self.events.ill_nodes(nodes)
        for node, state in ill.items():
            self.attempt.try_record("bad_node", node=node, reason=state)
        return ill

    def _release_lock(self) -> None:
        """Remove the run's lock where the attempt that held it has ended.

        Slurm runs one attempt of a job at a time: what an ended one held is free. From another
        machine the ranks could not know, and would wait for minutes.
        """
        path = self.run / LOCK
        with contextlib.suppress(OSError, ValueError, SlurmError):
            owner = json.loads(path.read_text()).get("job")
            if owner == self.number or (owner and owner not in slurm.queue()):
                self.log(f"{path} was left by an attempt of job {owner} that is gone: removed")
                path.unlink()

    def _without_nodes(self, bad: Mapping[str, str]) -> int:
        """Come back on other nodes, so many times at most: too few of these are fit."""
        names = ", ".join(f"{node} ({reason})" for node, reason in bad.items())
        before = sum(
            "bad node" in attempt.reason for attempt in attempts(self.run, since_submit=True)
        )
        if before >= self.job.site.caps.node_exclusions:
            ended = Outcome(1, f"bad node {names}; {before} requeues did not help")
            self._record_end(ended)
            self._end_chain()
            self.log(f"given up: {ended.reason}")
            return 1
        ended = Outcome(EXIT_RESUME, f"bad node {names}")
        self._record_end(ended)
        return self._requeue(Decision(True, False, 1, ended.reason), exclude=[*bad])

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
        step = next((line.step for line in newest_ledger_lines(self.run)), None)
        self.attempt.try_record(
            "end",
            attempt=self.attempt.restart,
            code=ended.code,
            step=step,
            checkpoint=newest_checkpoint(self.run),
            reason=ended.reason,
            node=ended.node,
            interruption=ended.interruption,
        )

    def _after(self, ended: Outcome) -> int:
        if self.attempt.superseded:
            self.log("another attempt has gone on with this run: nothing more is done here")
            return ended.code
        user = user_stop(self.attempt)
        ended = self._explained(ended, user)
        self._record_end(ended)
        if not user:
            with contextlib.suppress(OSError):
                (self.run / STOP_NOW).unlink(missing_ok=True)
        decision = decide(
            ended,
            self._history(ended),
            self.job.site.caps,
            by_user=user,
            time_is_up=self.watch.time_is_up,
            next_waits=self._next_waits(),
        )
        if decision.again:
            return self._requeue(decision)
        self.log(f"ended with {decision.exit_code}: {decision.reason}")
        self.attempt.try_record("verdict", code=decision.exit_code, reason=decision.reason)
        if decision.exit_code == EXIT_DONE:
            with contextlib.suppress(OSError):
                (self.run / FOLDER / DONE).write_text(f"job {self.number}\n")
        if decision.end_chain:
            self._end_chain()
        if ended.interruption is Interruption.NODE_LOST:
            with contextlib.suppress(SlurmError):  # Slurm itself has put the job back
                slurm.cancel([self.attempt.task])
        return decision.exit_code

    def _history(self, ended: Outcome) -> list[AttemptRecord]:
        """Return this submission's attempts.

        This one's end is in them also where the disk had no room for it.
        """
        history = attempts(self.run, since_submit=True)
        for one in history[-1:]:
            if (one.job, one.attempt) == (self.number, self.attempt.restart) and one.code is None:
                one.code, one.interruption = ended.code, ended.interruption
                one.checkpoint = newest_checkpoint(self.run)
        return history

    def _explained(self, ended: Outcome, user: str | None) -> Outcome:
        """Return the outcome with the cause that came from outside."""
        if user == "cancelled" and ended.code not in (EXIT_DONE, EXIT_USER_MISTAKE):
            saved = "" if ended.code == EXIT_RESUME else f" ({ended.reason})"
            return Outcome(EXIT_RESUME, f"cancelled on request{saved}", ended.node)
        how = None if ended.code == EXIT_DONE else self.events.ask()
        if how is not None:
            ended = interrupted(ended, how)
            if how is Interruption.NODE_LOST:
                nodes = slurm.hostnames(self.attempt.environment["SLURM_JOB_NODELIST"])
                ill = [f"{node} is {state}" for node, state in self._blame(nodes).items()]
                ended = replace(ended, reason=": ".join([ended.reason, ", ".join(ill)]))
        elif ended.code == EXIT_RESUME and self.watch.asked is not None:
            ended = replace(ended, reason=f"{ended.reason}: {self.watch.asked}")
        return ended

    def _requeue(self, decision: Decision, exclude: Sequence[str] = ()) -> int:
        """Put the job back into the queue and return the exit code.

        Slurm answers by ending this very process, which must live until it has also said which
        nodes it does not want: a running job's list cannot be changed.
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _retry(lambda: self._put_back(decision.reason), self.log)
        if exclude:
            _retry(lambda: self._exclude(exclude), self.log)
        return decision.exit_code

    def _put_back(self, reason: str) -> None:
        """Requeue the job, unless Slurm has done that, or it is cancelled.

        Neither is ours to undo. In a preemption's grace time it still runs, and would count as
        complete if it left by itself; at its time limit nobody else requeues it.
        """
        fields = slurm.job_fields(self.attempt.task)
        if put_back(fields, self.attempt.restart):
            self.log(f"Slurm has put the job back into the queue itself ({reason})")
        elif self.events.interpret(fields) is Interruption.CANCELLED:
            self.log(f"the job was cancelled meanwhile ({reason})")
        else:
            self.log(f"back into the queue ({reason})")
            slurm.requeue(self.attempt.task)

    def _exclude(self, nodes: Sequence[str]) -> None:
        """Keep the job off these nodes, beside those that it was kept off before."""
        before = slurm.job_fields(self.attempt.task).get("ExcNodeList", "(null)")
        known = slurm.hostnames(before) if before != "(null)" else []
        ours = (*self.job.exclude, *self.job.site.exclude)
        slurm.exclude(self.attempt.task, sorted({*ours, *known, *nodes}))

    def _next_waits(self) -> bool:
        with contextlib.suppress(SlurmError):
            return any(found.state == "PENDING" for found in self._others().values())
        return False

    def _others(self) -> dict[str, slurm.QueuedJob]:
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
                self.log(f"cancelling {', '.join(waiting)}: not wanted any more")
                slurm.cancel(waiting)


def _retry(action: Callable[[], None], log: Callable[[str], None]) -> None:
    """Try an action again and again: a controller that is busy must not cost the run."""
    for pause in (1, 2, 5, 10, 20, 30, 60, *[300] * 12):  # an hour: it may be an upgrade
        try:
            action()
            return
        except SlurmError as error:
            log(f"{error} Trying again in {pause} s.")
            time.sleep(pause)
    action()


def _shell_code(code: int) -> int:
    return code if code >= 0 else 128 - code


def main(arguments: Sequence[str]) -> int:
    """Run one attempt for the batch script; return its exit code."""
    try:
        return Supervisor(read_job(Path(arguments[0])), dict(os.environ)).supervise()
    except SlurmError as error:  # Slurm was away: nothing was decided, which the script mends
        return _fail(str(error), 1)
    except MegahybridError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        known = from_os_error(error)
        # A node whose file system is ill: not decided here, so that the script leaves it out.
        mistake = known is not None and not isinstance(known, StorageError)
        return _fail(str(known or error), EXIT_USER_MISTAKE if mistake else 1)
    except (IndexError, KeyError) as error:
        return _fail(f"no batch job of ours ({error!r}).", EXIT_USER_MISTAKE)


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print(f"megahybrid: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
