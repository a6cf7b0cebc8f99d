"""The launcher on a real Slurm, with ranks that only pretend to train: what Slurm does to a job,
and what comes after. The same with real training is in tests/faults/."""

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.records import attempts, read_records
from megahybrid.config import load
from tests.launch.cluster import Cluster, missing

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.slow,
    pytest.mark.timeout(240),
]
ROOT = Path(__file__).parents[2]
SITE = """
name: pretend
time_limit: "0:30:00"
gpus_per_node: 0
ranks_per_node: 2
exclusive: false
memory: null
stop_lead_seconds: 60
python: [{python}]
environment: {{MASTER_ADDR: 127.0.0.1, PRETEND_STEPS: "{steps}"}}
node_check: {{free_disk_gib: 0, free_memory_gib: 0{check}}}
watchdog:
  every: 0.5
  silent: 8
  limits: {{start: 60, compile: 60, data: 60, step: 60, evaluate: 60, save: 60}}
{more}
"""
RUN = f"""
include: [{ROOT}/configs/models/rnope_swa_tiny.yaml]
data: {{sources: {{text: {{path: nowhere}}}}, documents: masked, block_tokens: 4096}}
stages:
  - name: short
    tokens: 122880
    lengths: {{256: 1}}
    batch_tokens: 12288
    micro_batch_tokens: 1024
    weights: {{text: 1}}
    learning_rate: {{kind: linear, start: 1.0e-3, end: 1.0e-3}}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(3) as one:
        yield one


@pytest.fixture(autouse=True)
def _slurm(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    monkeypatch.setenv("PATH", cluster.environment["PATH"])
    monkeypatch.chdir(ROOT)
    yield
    cluster.call("scancel", "-u", "root", check=False)
    _until(lambda: not cluster.call("squeue", "-h", check=False), "an empty queue", 40)


class Run:
    """One run of the launcher's own commands, with pretended ranks."""

    def __init__(
        self,
        folder: Path,
        *faults: str,
        nodes: int = 2,
        steps: int = 30,
        more: str = "",
        check: str = "",
        **options,
    ) -> None:
        from launch.submit import plan, submit

        self.directory = folder / "run; $(touch pwned)"
        site = folder / "site.yaml"
        site.write_text(SITE.format(python=sys.executable, steps=steps, more=more, check=check))
        (folder / "run.yaml").write_text(RUN)
        overrides = [f"directory={self.directory}"]
        # As the command line would, except for what a rank runs.
        job, resolved = plan(folder / "run.yaml", overrides, site=str(site), nodes=nodes, **options)
        pretend = (str(ROOT / "tests/launch/pretend.py"), *faults)
        self.job = job.model_copy(update={"train": pretend, "name": "demo; $(touch pwned)"})
        self.numbers = submit(self.job, resolved)

    @property
    def status(self) -> str:
        from launch.status import read_queue, status_line

        return status_line(self.directory, read_queue())

    def until(self, words: str, seconds: float = 60) -> str:
        """The first status line with these words (a regular expression)."""
        return _until(
            lambda: (line := self.status) and re.search(words, line) and line,
            lambda: f"status with {words!r}; it is {self.status}",
            seconds,
        )

    def start_now(self) -> None:
        """A requeued job is held back for a while; not in a test."""
        from launch.control import requeue

        self.until("PENDING .* after attempt", 60)
        with contextlib.suppress(Exception):
            requeue(self.directory)

    def codes(self) -> list[int | None]:
        return [attempt.code for attempt in attempts(self.directory)]


def _until(true: Callable[[], object], what: str | Callable[[], str], seconds: float):
    deadline = time.monotonic() + seconds
    while not (found := true()):
        if time.monotonic() > deadline:
            what = what() if callable(what) else what
            raise AssertionError(f"no {what} after {seconds} s")
        time.sleep(0.3)
    return found


def test_a_run_goes_from_submission_to_done_and_says_where_it_is(tmp_path: Path) -> None:
    run = Run(tmp_path)
    line = run.until("RUNNING .* step [0-9]+ loss")
    assert re.search(r"RUNNING job \d+ try 1 t\[1-2\] step age \d+s step \d+ loss [\d.]+ ", line)
    assert "DONE after 1 attempt" in run.until("DONE")
    assert run.codes() == [0]
    logs = run.directory / "logs" / f"{run.numbers[0]}.0"
    assert sorted(path.name for path in logs.glob("rank-*.log")) == [
        f"rank-000{rank}.log" for rank in range(4)
    ]
    assert "rank 3 of 4 begins" in (logs / "rank-0003.log").read_text()
    # The script, the resolved run and the job are kept; no name was ever run as a command.
    assert load(run.directory / "slurm/run.yaml").directory == str(run.directory)
    assert not list(ROOT.glob("pwned")) and not list(tmp_path.rglob("pwned"))


def test_a_warning_before_the_time_limit_saves_and_comes_back(tmp_path: Path) -> None:
    from launch import slurm

    run = Run(tmp_path, steps=40)
    run.until("RUNNING .* step [1-9]")
    slurm.warn(run.numbers[0])
    run.start_now()
    run.until("RUNNING .*try 2")
    run.until("DONE after 2 attempts")
    first, second = attempts(run.directory)
    assert (first.code, second.code) == (75, 0)
    assert second.checkpoint_before == first.checkpoint == first.step


def test_stop_saves_and_does_not_come_back_until_it_is_wanted(tmp_path: Path) -> None:
    from launch import control

    run = Run(tmp_path, steps=40)
    run.until("RUNNING .* step [1-9]")
    control.stop(run.directory)
    assert "STOPPED with code 75: stopped on request" in run.until("STOPPED")
    assert run.codes() == [75]
    assert "submitted again" in control.requeue(run.directory)
    run.until("DONE after 2 attempts")


def test_failures_are_tried_again_so_often_and_no_more(tmp_path: Path) -> None:
    run = Run(tmp_path, "fail@3", more="caps: {failures_in_a_row: 2}")
    run.start_now()
    line = run.until("GIVEN UP", 90)
    assert "GIVEN UP with code 7: 2 failures in a row" in line
    assert "rank 1: ValueError: on purpose" in line
    assert run.codes() == [7, 7]
    from launch.tail import tail

    text = tail(run.directory, 5)
    assert text[0].startswith("first error: rank 1 on ") and "ValueError: on purpose" in text[0]


@pytest.mark.parametrize("code", [2, 93])
def test_a_mistake_and_a_run_that_must_not_restart_end_the_chain(tmp_path: Path, code: int) -> None:
    run = Run(tmp_path, f"code={code}@2", chain=3)
    run.until(f"GIVEN UP with code {code}", 60)
    assert run.codes() == [code]
    assert len(run.numbers) == 3


def test_a_chain_ends_when_the_run_is_done(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=12, chain=3, array=True)
    run.until("DONE after 1 attempt")
    _until(lambda: "PENDING" not in run.status, "end of the array", 20)


def test_a_stopped_rank_is_noticed_named_and_replaced(tmp_path: Path, cluster: Cluster) -> None:
    run = Run(tmp_path, nodes=1, steps=40)
    run.until("RUNNING .* step 1[0-9]")
    from megahybrid.heartbeat import read_beats

    os.kill(read_beats(run.directory)[1].pid, signal.SIGSTOP)
    run.start_now()
    run.until("DONE after 2 attempts", 90)
    first, second = attempts(run.directory)
    assert first.code == 137 and first.reason.startswith("hang: rank 1 gave no sign for ")
    assert second.checkpoint_before == 10
    stacks = run.directory / "logs" / f"{run.numbers[0]}.0" / "stacks-0001.txt"
    assert "pretend.py" in stacks.read_text()


def test_a_lost_node_is_survived_on_the_others(tmp_path: Path, cluster: Cluster) -> None:
    run = Run(tmp_path, nodes=2, steps=80)
    run.until("RUNNING .* step [1-9]")
    # t1 runs the batch script; t2 only ranks.
    cluster.power_off("t2")
    try:
        run.until("PENDING|try 2", 90)
        with contextlib.suppress(AssertionError):
            run.start_now()
        run.until("RUNNING .*try [2-9] t\\[1,3\\]", 90)
        run.until("DONE", 60)
    finally:
        cluster.power_on("t2")
        cluster.call("scontrol", "update", "NodeName=t2", "State=RESUME", check=False)
        _until(
            lambda: "idle" in cluster.call("sinfo", "-h", "-n", "t2", "-p", "main", "-o", "%T"),
            "t2 back",
            60,
        )
    assert attempts(run.directory)[0].code != 0


def test_a_preempted_run_saves_in_the_grace_time_and_comes_back(
    tmp_path: Path, cluster: Cluster
) -> None:
    run = Run(tmp_path, nodes=3, steps=60, more="partition: low")
    run.until("RUNNING .* step [1-9]")
    cluster.call(
        "sbatch", "-p", "high", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 3"
    )
    run.until("PENDING|try 2", 60)
    run.start_now()
    run.until("DONE after 2 attempts", 90)
    first, second = attempts(run.directory)
    assert first.code == 75 and second.checkpoint_before == first.step


def test_a_bad_node_is_named_and_a_spare_takes_its_place(tmp_path: Path, cluster: Cluster) -> None:
    from launch.status import node_lines

    run = Run(
        tmp_path,
        nodes=2,
        steps=10,
        spares=1,
        check=", command: 'echo said to be bad; test $SLURMD_NODENAME != t2'",
    )
    run.until("DONE after 1 attempt")
    bad = [line for line in read_records(run.directory) if line["event"] == "bad_node"]
    assert [line["node"] for line in bad] == ["t2"]
    assert any(
        line.startswith("t2: ") and "said to be bad" in line for line in node_lines(run.directory)
    )
