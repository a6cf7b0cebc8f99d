"""Finite numbers that are wrong: spikes are passed over, a lost bit stops the run."""

import json
import shutil
from pathlib import Path

import pytest

from megahybrid.checkpoint.manifest import MANIFEST_NAME, read_manifest
from megahybrid.ledger import EventLine, read_every_line, read_ledger
from tests.events import named
from tests.train.example import STEPS, arithmetic_of, checkpoint_bytes, steps_of
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


REWIND = [*SPIKES, "optimizer.skip_spikes.action=rewind", "parallel.tensor=2"]


def _oracle(example: Path, nursery: Nursery, before: int, spike: int) -> Path:
    """The run that begins from checkpoint `before` at the data that follows step `spike`: both are
    taken from a run without any spike."""
    plain = example / "plain"
    whole = ["train", "run.yaml", "directory=plain", "checkpoint.every_steps=1", *REWIND]
    ranks = Ranks(nursery, whole, 2, example)
    assert ranks.wait() == [0, 0], ranks.text()
    oracle = example / "oracle"
    folder = oracle / "checkpoints" / f"step-{before:08d}"
    shutil.copytree(plain / "checkpoints" / folder.name, folder)
    there = read_manifest(plain / "checkpoints" / f"step-{spike:08d}").train_state["data"]
    manifest = read_manifest(folder)
    state = {**manifest.train_state, "data": there}
    (folder / MANIFEST_NAME).write_text(
        manifest.model_copy(update={"train_state": state}).to_json()
    )
    ranks = Ranks(nursery, ["train", "run.yaml", "directory=oracle", *REWIND], 2, example)
    assert ranks.wait() == [0, 0], ranks.text()
    return oracle


@pytest.mark.parametrize(
    ("every", "before", "faults"),
    [(3, 6, ["spike_in_ninth_step", "spike_and_kill"]), (100, 4, ["spike_in_ninth_step"])],
    ids=["step-6", "stage-end"],
)
def test_after_a_rewind_it_is_the_run_that_never_saw_the_data(
    every: int, before: int, faults: list[str], nursery: Nursery, example: Path
) -> None:
    oracle = _oracle(example, nursery, before, 9)
    often = f"checkpoint.every_steps={every}"
    for fault in faults:
        name, run = fault, example / fault
        arguments = ["train", "run.yaml", f"directory={name}", often, *REWIND]
        ranks = Ranks(nursery, arguments, 2, example, fault=fault)
        if fault == "spike_and_kill":
            assert ranks.wait()[1] == -9
            # The checkpoint knows nothing of the rewind; the ledger does.
            ranks = Ranks(nursery, arguments, 2, example)
        assert ranks.wait() == [0, 0], ranks.text()
        held = arithmetic_of(run)
        assert [line[0] for line in held] == list(range(1, STEPS + 1))
        assert held[before:] == arithmetic_of(oracle)
        assert checkpoint_bytes(run) == checkpoint_bytes(oracle)
        (event,) = named(read_ledger(run / "ledger.jsonl"), "rewind")
        assert (event.step, event.detail["from_step"], event.detail["times"]) == (before, 9, 1)
        assert event.detail["reason"].startswith("spike: loss ")


def test_a_run_that_only_goes_back_is_given_up(nursery: Nursery, example: Path) -> None:
    arguments = ["train", "run.yaml", "directory=run", *REWIND, "max_skipped_in_a_row=2"]
    ranks = Ranks(nursery, arguments, 2, example, fault="spikes_from_the_ninth_step")
    assert ranks.wait() == [93, 93], ranks.text()
    assert "max_skipped_in_a_row=2 times the run went back to step 6" in ranks.last_line()


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
