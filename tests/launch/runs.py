"""Runs on a Slurm of their own: fixtures, and a run whose ranks only pretend to train."""

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megahybrid.errors import MegahybridError
from megahybrid.launch.control import requeue
from megahybrid.launch.job import Job
from megahybrid.launch.records import attempts
from megahybrid.launch.status import read_queue, status_line
from megahybrid.launch.submit import plan, submit
from tests.launch.cluster import Cluster

ROOT = Path(__file__).parents[2]
SITE = """
name: pretend
time_limit: "{limit}"
gpus_per_node: 0
ranks_per_node: 2
exclusive: false
memory: null
stop_lead_seconds: 60
python: [{python}]
environment: {{MASTER_ADDR: 127.0.0.1, PRETEND_STEPS: "{steps}", PRETEND_SAVE: "{save}"}}
node_check: {{free_disk_gib: 0, free_memory_gib: 0, {check}}}
watchdog:
  every: 0.5
  silent: 8
  limits: {{start: 60, compile: 60, data: 60, step: 60, evaluate: 60, save: 60}}
{more}
"""
RUN = f"""
include: [{ROOT}/configs/models/rnope_swa_tiny.yaml]
data: {{sources: {{text: {{path: .}}}}, documents: masked, block_tokens: 4096}}
stages:
  - name: short
    tokens: 122880
    lengths: {{256: 1}}
    batch_tokens: 12288
    micro_batch_tokens: 1024
    weights: {{text: 1}}
    learning_rate: {{kind: linear, start: 1.0e-3, end: 1.0e-3}}
"""


_PROGRESS = r"( \| (step \d+ loss [\d.]+)? ?(ckpt \d+)?)?"
STATUS = re.compile(
    r"run[^:]*: (?:"
    r"(RUNNING|COMPLETING|CONFIGURING|SUSPENDED) job [\d_]+( try \d+)? t\S* "
    r"(preparing|ending|(start|compile|data|step|evaluate|save) age \d+s)( step \d+ loss [\d.]+)? "
    r"(no ckpt|ckpt \d+) left [\d:-]+( \| .*)?"
    r"|PENDING job \S+( \(\+\d+ in the chain\))? \([^()]+\)"
    r"( after (attempt \d+: |the batch process ).+)?" + _PROGRESS + "|"
    r"DONE after \d+ attempts?" + _PROGRESS + "|"
    r"(STOPPED|GIVEN UP) with code \d+: .+" + _PROGRESS + "|"
    r"NOT IN THE QUEUE \(job .+\)" + _PROGRESS + ")"
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(3) as one:
        yield one


@pytest.fixture
def slurm(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    monkeypatch.setenv("PATH", cluster.environment["PATH"])
    monkeypatch.chdir(ROOT)
    yield
    cluster.call("scancel", "-u", "root", check=False)
    until(lambda: not cluster.call("squeue", "-h", check=False), "an empty queue", 40)
    until(lambda: not cluster.jobs_processes(), lambda: f"end of {cluster.jobs_processes()}", 30)


class Submitted:
    """A run that is on the cluster."""

    def __init__(self, job: Job, numbers: list[str]) -> None:
        self.job = job
        self.numbers = numbers
        self.directory = job.directory

    @property
    def status(self) -> str:
        """The line a person reads. Whatever happens to the run, it has one of these forms."""
        line = status_line(self.directory, read_queue())
        assert STATUS.fullmatch(line), line
        return line

    def until(self, words: str, seconds: float = 60) -> str:
        """The first status line with these words (a regular expression)."""
        return until(
            lambda: (line := self.status) and re.search(words, line) and line,
            lambda: f"status with {words!r}; it is {self.status}",
            seconds,
        )

    def start_now(self) -> None:
        """A requeued job is held back for a while; not in a test."""
        self.until("PENDING .* after attempt", 60)
        with contextlib.suppress(MegahybridError):
            requeue(self.directory)

    def supervisors(self) -> list[int]:
        """The batch processes of the run on this machine."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_bytes().decode(errors="replace").split("\0")
                if "megahybrid.launch.supervise" in words and self.job.file in words:
                    found.append(int(path.parent.name))
        return found

    def codes(self) -> list[int | None]:
        return [attempt.code for attempt in attempts(self.directory)]


class Run(Submitted):
    """A run of the launcher's own making, with pretended ranks."""

    def __init__(
        self,
        folder: Path,
        *faults: str,
        nodes: int = 2,
        steps: int = 30,
        save: float = 0.1,  # seconds that a save is said to have taken
        limit: str = "0:30:00",
        more: str = "",
        check: str = "pairs: false",
        python: str = sys.executable,
        **options: Any,
    ) -> None:
        directory = folder / "run; $(touch pwned)"
        site = folder / "site.yaml"
        facts = {"steps": steps, "save": save, "limit": limit, "more": more, "check": check}
        site.write_text(SITE.format(python=python, **facts))
        (folder / "run.yaml").write_text(RUN)
        # As the command line would, except for what a rank runs.
        job, resolved = plan(
            folder / "run.yaml", [f"directory={directory}"], site=str(site), nodes=nodes, **options
        )
        pretend = (str(ROOT / "tests/launch/pretend.py"), *faults)
        job = job.model_copy(update={"train": pretend, "name": "demo; $(touch pwned)"})
        super().__init__(job, submit(job, resolved))
        self.resolved = resolved

    def submit_again(self) -> None:
        """As `megahybrid launch submit` with the same run file does."""
        self.numbers += submit(self.job, self.resolved)


def until(true: Callable[[], object], what: str | Callable[[], str], seconds: float):
    deadline = time.monotonic() + seconds
    while not (found := true()):
        if time.monotonic() > deadline:
            what = what() if callable(what) else what
            raise AssertionError(f"no {what} after {seconds} s")
        time.sleep(0.3)
    return found
