"""`Attempt`: one start of a job's ranks, as its batch process knows it."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megahybrid.heartbeat import Beat, read_beats
from megahybrid.launch import slurm
from megahybrid.launch.job import Job
from megahybrid.launch.records import attempts, record
from megahybrid.launch.slurm import SlurmError
from megahybrid.launch.step import step_environment

KILL_SECONDS = 60.0  # what srun may take to end after its ranks were killed


@dataclass(frozen=True)
class Attempt:
    """One start of a job: the job, its number, how often it was started before, its environment.

    The environment is the one that Slurm gave the batch process.
    """

    job: Job
    number: str
    restart: int
    environment: Mapping[str, str]

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.job.directory

    @property
    def name(self) -> str:
        """The attempt's name in its logs and its ranks' heartbeats."""
        return f"{self.number}.{self.restart}"

    @property
    def task(self) -> str:
        """The job as scontrol must name it.

        The number of an array's last task is that of the whole array, and would put every other
        task back too.
        """
        array = self.environment.get("SLURM_ARRAY_JOB_ID")
        return f"{array}_{self.environment['SLURM_ARRAY_TASK_ID']}" if array else self.number

    @property
    def logs(self) -> Path:
        """The folder of this attempt's logs."""
        return self.run / "logs" / self.name

    @property
    def superseded(self) -> bool:
        """True once a later attempt has begun.

        This node was silent for long, Slurm took it for dead and went on elsewhere. Then the run's
        files and the job's steps belong to that attempt.
        """
        try:
            newest = attempts(self.run)[-1:]
        except OSError:  # a file system that stumbles says nothing
            return False
        return any((one.job, one.attempt) != (self.number, self.restart) for one in newest)

    def beats(self) -> dict[int, Beat]:
        """The heartbeats of this attempt's ranks."""
        return read_beats(self.run, self.name)

    def log(self, message: str) -> None:
        """Write one line to the batch log.

        That may lie on a full disk, and costs nothing but itself.
        """
        try:
            print(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {message}", flush=True)
        except OSError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (else Python itself ends with 120)

    def record(self, event: str, **facts: Any) -> None:
        """Write one line to the run's records, with the job's number."""
        record(self.run, event, job=self.number, **facts)

    def try_record(self, event: str, **facts: Any) -> None:
        """Write one line to the records where that is possible.

        It is for facts that are only told: a full disk must not end ranks that compute.
        """
        try:
            self.record(event, **facts)
        except OSError as error:
            self.log(f"{event} could not be recorded ({error.strerror})")

    def step(self, nodes: Sequence[str]) -> dict[str, str]:
        """Return the environment of a step on `nodes`."""
        return step_environment(self.job, self.environment, nodes, self.restart, self.logs)

    def start(self, command: Sequence[str], nodes: Sequence[str], log: str) -> subprocess.Popen:
        """Start a step on `nodes`; the messages of srun itself go to the log of that name."""
        with open(self.logs / log, "a") as file:
            return subprocess.Popen(
                command,
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                env=self.step(nodes),
            )

    def kill(self, process: subprocess.Popen) -> None:
        """Ends the job's steps, and the srun that waits for them."""
        if self.superseded:
            process.kill()
        else:
            with contextlib.suppress(SlurmError):
                slurm.cancel(slurm.steps(self.number), signal="KILL")
        try:
            process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
