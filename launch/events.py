"""`JobEvents`: the events that reach an attempt from outside, in whatever phase it is."""

import contextlib
import signal
import time
from collections.abc import Mapping, Sequence

from megahybrid.launch import slurm
from megahybrid.launch.attempt import Attempt
from megahybrid.launch.interruption import Interruption, ended, interruption
from megahybrid.launch.job import STOP_NOW
from megahybrid.launch.slurm import SlurmError

_ILL = ("down", "drain", "fail")  # in the words of a node's state


class Stopped(Exception):
    """The attempt is to end before its ranks were started."""


class JobEvents:
    """Signals to the batch process, the time limit, and what Slurm says of the job."""

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt
        self.signals: list[str] = []
        self.time_limit: float | None = None  # by our monotonic clock
        self.interruption: Interruption | None = None

    def listen(self) -> None:
        """Note signals from now on; they end nothing by themselves."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._on_signal)
            # One that came before is a file of the batch script's.
            if (self.attempt.logs / number.name.removeprefix("SIG")).exists():
                self._on_signal(number, None)

    def _on_signal(self, number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        first = name not in self.signals
        self.signals.append(name)
        # At once: a few seconds later Slurm kills us, and the next attempt must know why.
        if first and name == "SIGTERM":
            left = self.seconds_left
            facts = {} if left is None else {"seconds_left": round(left, 1)}
            with contextlib.suppress(OSError):
                self.attempt.record("signal", attempt=self.attempt.restart, signal=name, **facts)

    @property
    def terminated(self) -> bool:
        """True once the batch process was told to end, by Slurm or by hand."""
        return "SIGTERM" in self.signals or "SIGINT" in self.signals

    @property
    def seconds_left(self) -> float | None:
        """The seconds until the time limit that the attempt began with."""
        return None if self.time_limit is None else self.time_limit - time.monotonic()

    def begin(self) -> None:
        """Read the time limit.

        A preemption would move it, and is none of it.
        """
        with contextlib.suppress(SlurmError, ValueError, KeyError):
            fields = slurm.job_fields(self.attempt.task)
            self.interpret(fields)
            if self.interruption is None:
                end = time.mktime(time.strptime(fields["EndTime"], "%Y-%m-%dT%H:%M:%S"))
                self.time_limit = time.monotonic() + end - time.time()

    def ask(self) -> Interruption | None:
        """Return what Slurm has done to the attempt so far, by its own words, and record it.

        Of a preemption Slurm knows nothing any more once the job is back in the queue: what was
        found once stays.
        """
        if self.interruption in (None, Interruption.ENDED):
            fields = None
            with contextlib.suppress(SlurmError):
                fields = slurm.job_fields(self.attempt.task)
            self.interpret(fields)
        return self.interruption

    def interpret(self, fields: Mapping[str, str] | None) -> Interruption | None:
        """Return what the job's `fields` say was done to the attempt, and record it."""
        over = self.terminated or ended(fields or {}, self.attempt.restart)
        how = interruption(
            fields,
            restart=self.attempt.restart,
            terminated=self.terminated,
            nodes_ill=over and bool(self.ill_nodes(self._own_nodes())),
            seconds_left=self.seconds_left,
        )
        if how is not None and how is not self.interruption:
            self.interruption = how
            self.attempt.log(f"this attempt: {how}")
            self.attempt.try_record("interrupted", attempt=self.attempt.restart, how=how)
        return how

    def _own_nodes(self) -> list[str]:
        with contextlib.suppress(SlurmError):
            return slurm.hostnames(self.attempt.environment.get("SLURM_JOB_NODELIST", ""))
        return []

    def ill_nodes(self, nodes: Sequence[str]) -> dict[str, str]:
        """Return those nodes that Slurm says are not well, and their state."""
        with contextlib.suppress(SlurmError):
            states = slurm.node_states(nodes)
            return {node: state for node, state in states.items() if any(x in state for x in _ILL)}
        return {}

    def check(self, doing: str) -> None:
        """Raise Stopped where nothing more is to be started.

        That is so where Slurm or a person ends this attempt. A step that ended badly says nothing
        before this was asked: TERM goes to steps first.
        """
        user = user_stop(self.attempt)
        if user is not None:
            raise Stopped(f"{user} on request while {doing}")
        if how := self.ask():
            raise Stopped(f"{how} while {doing}")
        if self.signals:
            raise Stopped(f"warned of the time limit while {doing}")


def user_stop(attempt: Attempt) -> str | None:
    """Return what a person wants of the run: that it is "stopped" or "cancelled".

    Our own request is for one attempt alone, and is none.
    """
    try:
        text = (attempt.run / STOP_NOW).read_text()
    except OSError:
        return None
    if text.startswith("supervisor"):
        return None
    return "cancelled" if text.startswith("cancel") else "stopped"
