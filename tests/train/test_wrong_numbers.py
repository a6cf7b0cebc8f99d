"""Finite numbers that are wrong: spikes are passed over, a lost bit stops the run."""

import json
from pathlib import Path

import pytest

from megahybrid.train.ledger import EventLine, read_every_line
from tests.train.example import STEPS, steps_of
from tests.train.forked import Nursery, Ranks

SPIKES = ["optimizer.skip_spikes.sigmas=50", "optimizer.skip_spikes.over_steps=8"]


def _skips(run: Path) -> list[tuple[int, str]]:
    events = [line for line in read_every_line(run / "ledger.jsonl") if type(line) is EventLine]
    return [(x.step, x.detail["reason"]) for x in events if x.event == "skip"]


@pytest.mark.parametrize(
    "layout", [["parallel.tensor=2"], ["parallel.zero_stage=2"]], ids=["tensor2", "data2-zero2"]
)
def test_a_spike_is_passed_over_on_all_ranks_and_told(
    layout: list[str], nursery: Nursery, example: Path
) -> None:
    arguments = ["train", "run.yaml", "directory=run", *layout, *SPIKES]
    ranks = Ranks(nursery, arguments, 2, example, fault="spike_in_ninth_step")
    assert ranks.wait() == [0, 0], ranks.text()
    steps = steps_of(example / "run")
    assert [line.step for line in steps if line.skipped] == [9]
    ((step, reason),) = _skips(example / "run")
    assert step == 9 and reason.startswith("spike: loss ")
    assert "deviations above the mean" in reason
    # Nothing of it stayed: the losses that follow are as those before.
    assert all(line.loss is not None and line.loss < 6 for line in steps if line.step != 9)
    manifest = example / "run" / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json"
    assert json.loads(manifest.read_text())["optimizer_step"] == STEPS - 1


def test_without_the_rule_the_spike_is_taken(nursery: Nursery, example: Path) -> None:
    arguments = ["train", "run.yaml", "directory=run", "parallel.tensor=2"]
    ranks = Ranks(nursery, arguments, 2, example, fault="spike_in_ninth_step")
    assert ranks.wait() == [0, 0], ranks.text()
    assert _skips(example / "run") == []


def test_a_bit_lost_on_one_data_rank_stops_the_run_for_good(
    nursery: Nursery, example: Path
) -> None:
    arguments = ["train", "run.yaml", "directory=run", "log.audit_every_steps=5"]
    ranks = Ranks(nursery, arguments, 2, example, fault="flipped_bit_after_fifth_step")
    assert ranks.wait() == [93, 93], ranks.text()
    assert "is not the same bits on all data ranks" in ranks.last_line()
    assert steps_of(example / "run")[-1].step == 5
