"""Watching the ranks until they end: ask them to stop in time, and end them where they hang."""

import contextlib
import signal
import subprocess
import time
from collections.abc import Mapping

from megahybrid.errors import EXIT_RESUME
from megahybrid.heartbeat import STACKS_SIGNAL, Beat, Hang, HangDetector, first_failure, slow_ranks
from megahybrid.launch import slurm
from megahybrid.launch.attempt import Attempt
from megahybrid.launch.events import JobEvents, user_stop
from megahybrid.launch.interruption import Interruption
from megahybrid.launch.job import STOP_NOW
from megahybrid.launch.records import stop_lead
from megahybrid.launch.slurm import SlurmError

POLL_SECONDS = 0.5
END_BEFORE_LIMIT = 20.0  # seconds that it takes to end ranks that do not stop, and to requeue
STACKS_SECONDS = 3.0  # what writing the stacks may take before the ranks are killed


class RankWatch:
    """Watches one srun."""

    def __init__(self, attempt: Attempt, events: JobEvents) -> None:
        self.attempt = attempt
        self.events = events
        self.asked: str | None = None  # why the ranks were asked to stop
        self.time_is_up = False
        self._all_began = False
        self._slurm_was_asked = False
        self._told_slow: set[int] = set()

    def until_end(self, process: subprocess.Popen) -> str | None:
        """Wait until srun ends. Returns why the ranks were killed, if they were."""
        limits = self.attempt.job.site.watchdog
        watch = HangDetector(self.attempt.job.world_size, limits.limits.model_dump(), limits.silent)
        look_at = stop_by = 0.0
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            now = time.monotonic()
            if self.events.signals and not self.attempt.superseded:
                self._on_signals()
            if self.events.interruption is Interruption.TIME_LIMIT:
                self.attempt.kill(process)  # Slurm kills us next, and nobody would requeue
                return str(Interruption.TIME_LIMIT)
            if now < look_at and not self._must_end():
                continue
            look_at = now + limits.every
            if self.attempt.superseded:
                self.attempt.kill(process)
                return "another attempt has gone on with this run"
            self._stop_in_time()
            try:
                beats = self.attempt.beats()
            except OSError:  # a file system that stumbles; the silence will be noticed
                continue
            self._look_whether_preempted(len(beats))
            self._tell_slow(beats)
            hang = watch.judge(beats, now)
            if self.asked is not None:
                stop_by = stop_by or now + limits.after_stop
                if hang is None and now > stop_by:
                    hang = Hang((), f"not stopped {limits.after_stop:.0f} s after being asked")
                elif hang is None and self._must_end():
                    hang = Hang((), "not stopped before the time limit")
            # Ranks that still end by themselves tell more than a kill.
            if hang is not None and process.poll() is None:
                if _failed(beats):
                    # Without its controller srun does not end the others.
                    self.attempt.kill(process)
                    return None
                self._end_hung(process, hang, beats)
                return f"hang: {hang.message}"
        return None

    def _stop_in_time(self) -> None:
        left = self.events.seconds_left
        if self.asked is None and left is not None:
            lead = stop_lead(self.attempt.run, self.attempt.job.lead_seconds)
            if left < lead:
                self.time_is_up = True
                self._ask(f"the time limit is {left:.0f} s away")

    def _must_end(self) -> bool:
        """Return whether ranks that were asked to stop would overrun the time limit.

        At the limit Slurm ends whoever could put the job back.
        """
        left = self.events.seconds_left
        return self.asked is not None and left is not None and left < END_BEFORE_LIMIT

    def _look_whether_preempted(self, began: int) -> None:
        """Ask Slurm once whether it has preempted the job, when all ranks are there.

        A TERM that came before their step existed reached nobody, and the grace time goes by.
        """
        if not self._all_began and began == self.attempt.job.world_size:
            self._all_began = True
            if self.asked is None and (how := self.events.ask()) is not None:
                self._ask(how)

    def _on_signals(self) -> None:
        name = self.events.signals[0]
        if self.asked is None and name == "SIGUSR1":
            self.events.begin()  # an operator may have moved the limit
            self.time_is_up = user_stop(self.attempt) is None
            self._ask("on request" if user_stop(self.attempt) else "warned by USR1")
        elif self.asked is None:
            self._ask(f"{name}: Slurm ends this attempt")
        if self.events.terminated and not self._slurm_was_asked:
            self._slurm_was_asked = True
            self.events.ask()  # now, while it knows: we may be killed before the ranks have ended

    def _ask(self, why: str) -> None:
        """Ask the ranks to save and leave.

        They are asked by a file that every step's end looks for, and by a signal, which a long
        evaluation gets too. A signal alone can come before there is a handler; torchrun's agents
        would die of it.
        """
        self.asked = why
        attempt = self.attempt
        attempt.log(f"asking the ranks to stop ({why})")
        path = attempt.run / STOP_NOW
        if not path.exists():
            with contextlib.suppress(OSError):  # a full disk; the signal does it too
                path.write_text(f"supervisor of job {attempt.number}: {why}\n")
        started = len(attempt.beats()) == attempt.job.world_size
        # Slurm gave the ranks the TERM that we got.
        if attempt.job.site.launcher == "srun" and started and not self.events.terminated:
            with contextlib.suppress(SlurmError):
                slurm.cancel(slurm.steps(attempt.number), signal="USR1")

    def _tell_slow(self, beats: Mapping[int, Beat]) -> None:
        for beat, times in slow_ranks(beats, self.attempt.job.site.watchdog.slow_ratio):
            if beat.rank not in self._told_slow:
                self._told_slow.add(beat.rank)
                message = f"rank {beat.rank} on {beat.host} takes {times:.1f}× the median time"
                self.attempt.log(f"slow: {message}")
                self.attempt.try_record(
                    "slow_rank", rank=beat.rank, node=beat.host, times=round(times, 2)
                )

    def _end_hung(self, process: subprocess.Popen, hang: Hang, beats: Mapping[int, Beat]) -> None:
        attempt = self.attempt
        attempt.log(f"hang: {hang.message}; stacks of all ranks are in {attempt.logs}/stacks-*.txt")
        for host in {beats[rank].host for rank in hang.ranks if rank in beats}:
            attempt.try_record("hang", node=host, reason=f"hang: {hang.message}")
        with contextlib.suppress(SlurmError):
            running = slurm.steps(attempt.number)
            # A stopped process must run again to say where it stood.
            slurm.cancel(running, signal="CONT")
            slurm.cancel(running, signal=signal.Signals(STACKS_SIGNAL).name.removeprefix("SIG"))
        time.sleep(STACKS_SECONDS)
        attempt.kill(process)


def _failed(beats: Mapping[int, Beat]) -> bool:
    """Return whether a rank has ended by a failure of its own."""
    failed = {r: beat for r, beat in beats.items() if beat.exit_code not in (None, EXIT_RESUME)}
    cause = first_failure(failed)
    return cause is not None and not cause.consequence
