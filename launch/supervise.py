"""The batch process of a job: `python -m launch.supervise RUN/slurm/….json`.

One attempt: look at the nodes, start the ranks, watch their heartbeats, ask them to stop in time,
keep their exit code, and put the job back into the queue where that is right (launch/policy.py).
Slurm starts the attempt after that as a new process. Every decision is one line in slurm/
attempts.jsonl and in the batch log.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launch import slurm
from launch.job import DONE, FOLDER, STOP_NOW, Job, read_job
from launch.policy import Decision, Outcome, decide, outcome
from launch.records import attempts, jobs, ledger_tail, newest_checkpoint, record, stop_lead
from launch.slurm import SlurmError
from launch.step import check_step, hostfile, hostfile_text, step_environment, train_step
from megahybrid.errors import EXIT_DONE, EXIT_RESUME, EXIT_USER_MISTAKE, MegahybridError
from megahybrid.heartbeat import (
    STACKS_SIGNAL,
    Watch,
    clear,
    read_beats,
    remove_empty_stacks,
    slow_ranks,
)

POLL_SECONDS = 0.5
STACKS_SECONDS = 3.0  # what writing the stacks may take before the ranks are killed
KILL_SECONDS = 60.0  # what srun may take to end after its ranks were killed
LOCK = "owner.lock"


class Supervisor:
    """One attempt of one job."""

    def __init__(self, job: Job, environment: Mapping[str, str]) -> None:
        self.job = job
        self.run = job.directory
        self.number = environment["SLURM_JOB_ID"]
        self.array = environment.get("SLURM_ARRAY_JOB_ID")
        self.attempt = int(environment.get("SLURM_RESTART_COUNT", "0"))
        self.logs = self.run / "logs" / f"{self.number}.{self.attempt}"
        self.environment = environment
        self.signals: list[str] = []  # what Slurm or a person sent us
        self.asked: str | None = None  # why the ranks were asked to stop
        self.ended_by_slurm = False
        self.time_is_up = False
        self.time_limit: float | None = None  # by our monotonic clock
        self.told_slow: set[int] = set()

    def go(self) -> int:
        """The attempt, from its first look to its exit code."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)
        if (self.run / FOLDER / DONE).exists():
            self.tell("the run is complete: nothing to do")
            self._end_chain()
            return EXIT_DONE
        if self._user_stop():
            self.tell(f"{self.run / STOP_NOW} is there: not started")
            self._end_chain()
            return EXIT_RESUME
        self.logs.mkdir(parents=True, exist_ok=True)
        nodes = slurm.hostnames(self.environment["SLURM_JOB_NODELIST"])
        self._explain_lost()
        self._release_lock()
        (self.run / STOP_NOW).unlink(missing_ok=True)
        record(
            self.run,
            "start",
            job=self.number,
            attempt=self.attempt,
            nodes=nodes,
            checkpoint=newest_checkpoint(self.run),
        )
        self.tell(f"job {self.number}, attempt {self.attempt + 1}, on {' '.join(nodes)}")
        try:
            good, bad = self._fit_nodes(nodes)
            if len(good) < self.job.nodes:
                return self._without_nodes(bad)
            ended = self._train(good[: self.job.nodes])
        except (OSError, MegahybridError) as error:
            ended = Outcome(1, f"the launcher failed: {error}")
        return self._after(ended)

    # What Slurm tells us. A handler only notes; the loop acts.
    def _note(self, number: int, _frame: object) -> None:
        self.signals.append(signal.Signals(number).name)

    def tell(self, message: str) -> None:
        """One line in the batch log."""
        print(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {message}", flush=True)

    def _user_stop(self) -> bool:
        """Whether a person wants the run to stop; our own request is of one attempt alone."""
        try:
            text = (self.run / STOP_NOW).read_text()
        except OSError:
            return False
        return not text.startswith("supervisor")

    def _explain_lost(self) -> None:
        """An attempt that wrote no end was lost: say which of its nodes are not well."""
        before = attempts(self.run)
        if not before or before[-1].code is not None:
            return
        lost = before[-1]
        with contextlib.suppress(SlurmError):
            states = slurm.node_states(lost.nodes)
            ill = {
                n: s for n, s in states.items() if any(w in s for w in ("down", "drain", "fail"))
            }
            for node, state in ill.items():
                record(self.run, "bad_node", node=node, reason=state, job=lost.job)
                self.tell(f"the attempt before was lost: {node} is {state}")

    def _release_lock(self) -> None:
        """Slurm runs one attempt of a job at a time: what an ended one held is free. From another
        machine the ranks could not know, and would wait for minutes."""
        path = self.run / LOCK
        with contextlib.suppress(OSError, ValueError, SlurmError):
            owner = json.loads(path.read_text()).get("job")
            if owner == self.number or (owner and owner not in slurm.queue()):
                self.tell(f"{path} was left by an attempt of job {owner} that is gone: removed")
                path.unlink()

    def _fit_nodes(self, nodes: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        check = self.job.site.node_check
        if not check.enabled:
            return list(nodes), {}
        folder = self.logs / "nodes"
        command = check_step(self.job, nodes, folder, time.time())
        with open(self.logs / "node-check.log", "a") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self._step(nodes)
            )
            self._wait(process, check.seconds)
        bad: dict[str, str] = {}
        for node in nodes:
            try:
                problems = json.loads((folder / f"{node}.json").read_text())["problems"]
            except (OSError, ValueError, KeyError):
                problems = [f"gave no answer in {check.seconds:.0f} s"]
            if problems:
                bad[node] = "; ".join(problems)
        if len(bad) == len(nodes) and not any(folder.glob("*.json")):
            last = (self.logs / "node-check.log").read_text().strip().splitlines()[-1:]
            raise SlurmError(f"no node could be checked ({' '.join(last) or 'srun said nothing'})")
        for node, reason in bad.items():
            self.tell(f"bad node {node}: {reason}")
            record(self.run, "bad_node", node=node, reason=reason, job=self.number)
        return [node for node in nodes if node not in bad], bad

    def _wait(self, process: subprocess.Popen, seconds: float) -> None:
        """Until a short step ends, at most `seconds`."""
        deadline = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if process.poll() is None:
            self._kill(process)

    def _step(self, nodes: Sequence[str]) -> dict[str, str]:
        return step_environment(self.job, self.environment, nodes, self.attempt, self.logs)

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
        clear(self.run)
        environment = self._step(nodes)
        if self.job.site.launcher == "deepspeed":
            Path(hostfile(environment)).write_text(hostfile_text(self.job, nodes))
        with open(self.logs / "srun.log", "a") as log:
            process = subprocess.Popen(
                train_step(self.job, nodes, environment),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment,
            )
            hang = self._watch(process)
        remove_empty_stacks(self.logs)
        beats = read_beats(self.run)
        if hang is not None:
            return Outcome(137, hang)
        return outcome(beats, self.job.world_size, _shell_code(process.returncode))

    def _watch(self, process: subprocess.Popen) -> str | None:
        """Until srun ends. Returns why the ranks were killed, if they were."""
        site = self.job.site
        watch = Watch(self.job.world_size, site.watchdog.limits.model_dump(), site.watchdog.silent)
        time_limit = self.time_limit = self._time_limit()
        look_at = stop_by = 0.0
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            now = time.monotonic()
            if self.signals and self.asked is None:
                self._on_signal(self.signals[0])
            if now < look_at:
                continue
            look_at = now + site.watchdog.every
            if self.asked is None and time_limit is not None:
                lead = stop_lead(self.run, self.job.lead_seconds)
                if now > time_limit - lead:
                    self.time_is_up = True
                    self._ask(f"the time limit is {time_limit - now:.0f} s away")
            beats = read_beats(self.run)
            self._tell_slow(beats)
            hang = watch.judge(beats, now)
            reason = hang.message if hang else None
            if self.asked is not None:
                stop_by = stop_by or now + site.watchdog.after_stop
                if reason is None and now > stop_by:
                    reason = f"not stopped {site.watchdog.after_stop:.0f} s after being asked"
            # Ranks that still end by themselves tell more than a kill.
            if reason is not None and process.poll() is None:
                self._end_hung(process, reason)
                return f"hang: {reason}"
        return None

    def _time_limit(self) -> float | None:
        """When the job's time is up, on our own clock."""
        with contextlib.suppress(SlurmError, ValueError, KeyError):
            end = slurm.job_fields(self.number)["EndTime"]
            left = time.mktime(time.strptime(end, "%Y-%m-%dT%H:%M:%S")) - time.time()
            return time.monotonic() + left
        return None

    def _on_signal(self, name: str) -> None:
        if name == "USR1":
            name = "SIGUSR1"
        if name == "SIGUSR1":
            self.time_is_up = not self._user_stop()
            self._ask("SIGUSR1: stop in time")
        else:
            # Slurm gave the ranks this signal too.
            self.ended_by_slurm = True
            record(self.run, "signal", job=self.number, attempt=self.attempt, signal=name)
            self._ask(f"{name}: Slurm ends this attempt")

    def _ask(self, why: str) -> None:
        """Ask the ranks to save and leave: by a file that every step's end looks for, and by a
        signal, which a long evaluation hears too. A signal alone can come before there is a
        handler; torchrun's agents would die of it."""
        self.asked = why
        self.tell(f"asking the ranks to stop ({why})")
        path = self.run / STOP_NOW
        if not path.exists():
            path.write_text(f"supervisor of job {self.number}: {why}\n")
        beats = read_beats(self.run)
        started = len(beats) == self.job.world_size
        if self.job.site.launcher == "srun" and started and not self.ended_by_slurm:
            with contextlib.suppress(SlurmError):
                slurm.cancel(slurm.steps(self.number), signal="USR1")

    def _tell_slow(self, beats: Mapping) -> None:
        for beat, times in slow_ranks(beats, self.job.site.watchdog.slow_ratio):
            if beat.rank not in self.told_slow:
                self.told_slow.add(beat.rank)
                message = f"rank {beat.rank} on {beat.host} takes {times:.1f}× the median time"
                self.tell(f"slow: {message}")
                record(
                    self.run,
                    "slow_rank",
                    job=self.number,
                    rank=beat.rank,
                    node=beat.host,
                    times=round(times, 2),
                )

    def _end_hung(self, process: subprocess.Popen, reason: str) -> None:
        self.tell(f"hang: {reason}; stacks of all ranks are in {self.logs}/stacks-*.txt")
        with contextlib.suppress(SlurmError):
            running = slurm.steps(self.number)
            # A stopped process must run again to say where it stood.
            slurm.cancel(running, signal="CONT")
            slurm.cancel(running, signal=signal.Signals(STACKS_SIGNAL).name.removeprefix("SIG"))
        time.sleep(STACKS_SECONDS)
        self._kill(process)

    def _kill(self, process: subprocess.Popen) -> None:
        with contextlib.suppress(SlurmError):
            slurm.cancel(slurm.steps(self.number), signal="KILL")
        try:
            process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _record_end(self, ended: Outcome) -> None:
        step = next((line["step"] for line in ledger_tail(self.run) if "step" in line), None)
        record(
            self.run,
            "end",
            job=self.number,
            attempt=self.attempt,
            code=ended.code,
            step=step,
            checkpoint=newest_checkpoint(self.run),
            reason=ended.reason,
        )

    def _after(self, ended: Outcome) -> int:
        user = self._user_stop()
        self._record_end(ended)
        if not user:
            (self.run / STOP_NOW).unlink(missing_ok=True)
        decision = decide(
            ended,
            attempts(self.run, since_submit=True),
            self.job.site.caps,
            stopped_by_user=user,
            ended_by_slurm=self.ended_by_slurm,
            time_is_up=self.time_is_up,
            next_waits=self._next_waits(),
        )
        if decision.again:
            return self._requeue(decision)
        self.tell(f"ended with {decision.exit_code}: {decision.reason}")
        record(
            self.run, "verdict", job=self.number, code=decision.exit_code, reason=decision.reason
        )
        if decision.exit_code == EXIT_DONE:
            (self.run / FOLDER / DONE).write_text(f"job {self.number}\n")
        if decision.end_chain:
            self._end_chain()
        return decision.exit_code

    def _requeue(self, decision: Decision, exclude: Sequence[str] = ()) -> int:
        """Back into the queue. Slurm answers by ending this very process, which must live until it
        has also said which nodes it does not want: a running job's list cannot be changed."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.ended_by_slurm and self._leaving():
            # Cancelled, or put back by Slurm itself: neither is ours to undo.
            self.tell(f"ended by Slurm ({decision.reason})")
            return decision.exit_code
        self.tell(f"back into the queue ({decision.reason})")
        _often(lambda: slurm.requeue(self.number), self.tell)
        if exclude:
            _often(lambda: slurm.exclude(self.number, exclude), self.tell)
        return decision.exit_code

    def _leaving(self) -> bool:
        """Whether Slurm has ended the job already. In a preemption's grace time it still runs (and
        would count as complete if it left by itself); at its time limit nobody else requeues it."""
        if self.time_limit is not None and time.monotonic() >= self.time_limit:
            return False
        with contextlib.suppress(SlurmError):
            return slurm.job_fields(self.number).get("JobState") != "RUNNING"
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
    for pause in (1, 2, 5, 10, 20, 30, 60):
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
