"""The launcher on a real Slurm, with ranks that only pretend to train: what Slurm does to a job,
and what comes after. Nodes lost, preemption and real training are in tests/faults/."""

import re
from pathlib import Path

import pytest

from megahybrid.config import load
from megahybrid.launch.records import attempts, read_records
from tests.launch.cluster import Cluster, missing
from tests.launch.runs import ROOT, Run, cluster, slurm, until

__all__ = ["cluster", "slurm"]
pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.usefixtures("slurm"),
    pytest.mark.slow,
    pytest.mark.timeout(240),
]


def test_a_run_goes_from_submission_to_done_and_says_where_it_is(tmp_path: Path) -> None:
    run = Run(tmp_path)
    line = run.until("RUNNING .* step [0-9]+ loss")
    assert re.search(
        r"RUNNING job \d+ try 1 t\[1-2\] (start|step) age \d+s step \d+ loss [\d.]+ ", line
    )
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
    from megahybrid.launch import slurm

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
    from megahybrid.launch import control

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
    from megahybrid.launch.tail import tail

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
    until(lambda: "PENDING" not in run.status, "end of the array", 20)


def test_a_bad_node_is_named_and_a_spare_takes_its_place(tmp_path: Path, cluster: Cluster) -> None:
    from megahybrid.launch.status import node_lines

    run = Run(
        tmp_path,
        nodes=2,
        steps=10,
        spares=1,
        check="pairs: false, command: 'echo said to be bad; test $SLURMD_NODENAME != t2'",
    )
    run.until("DONE after 1 attempt")
    bad = [line for line in read_records(run.directory) if line["event"] == "bad_node"]
    assert [line["node"] for line in bad] == ["t2"]
    assert any(
        line.startswith("t2: ") and "said to be bad" in line for line in node_lines(run.directory)
    )
