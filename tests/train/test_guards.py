"""Runs that must not go on: wrong gradients, replicas that differ, too many that are no numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

from megahybrid.ledger import EventLine, read_every_line
from tests.train.example import STEPS, steps_of
from tests.train.forked import Nursery, Ranks

BROKEN: dict[str, tuple[str, list[str], str]] = {
    "the wrap of norm weights": ("no_wrap_of_norms", [], "_norm.weight through copy_to_tensor"),
    "the wrap of key and value heads that ranks share": (
        "no_wrap_of_shared_heads",
        ["model.num_kv_heads=1"],
        "Read attention.key.weight through copy_to_tensor",
    ),
    "the mark, on every parameter": ("marks_on_all", [], "is marked but not sharded"),
    "the mark, on none": ("marks_on_none", [], "is sharded but not marked"),
    "the mark, left out": ("marks_forgotten", [], "is sharded but not marked"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_run_does_not_pass_without(what: str, nursery: Nursery, example: Path) -> None:
    fault, overrides, words = BROKEN[what]
    arguments = ["train", "run.yaml", "directory=run", "parallel.tensor=2", *overrides]
    ranks = Ranks(nursery, arguments, 2, example, fault=fault)
    assert ranks.wait() == [93, 93], ranks.text()
    assert ranks.last_line().startswith("megahybrid: audit: ")
    assert words in ranks.last_line()
    assert not (example / "run" / "checkpoints").exists()
    assert not steps_of(example / "run")


def test_replicas_that_part_on_the_way_are_seen_at_the_next_audit(
    nursery: Nursery, example: Path
) -> None:
    arguments = ["train", "run.yaml", "directory=run", "parallel.tensor=2"]
    arguments += ["checkpoint.every_steps=100", "log.audit_every_steps=7"]
    ranks = Ranks(nursery, arguments, 2, example, fault="another_replica")
    assert ranks.wait() == [93, 93], ranks.text()
    assert "the replicated weight final_norm.weight" in ranks.last_line()
    assert steps_of(example / "run")[-1].step == 7


LAYOUTS = {
    "tensor2-zero1": ["parallel.tensor=2"],
    "data2-zero0": ["parallel.zero_stage=0"],
    "data2-zero1": [],
    "data2-zero3-bf16": ["parallel.zero_stage=3", "precision=bf16"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_that_is_no_number_on_one_rank_skips_one_update_on_all(
    layout: str, nursery: Nursery, example: Path
) -> None:
    arguments = ["train", "run.yaml", "directory=run", *LAYOUTS[layout]]
    ranks = Ranks(nursery, arguments, 2, example, fault="no_number_in_third_step")
    assert ranks.wait() == [0, 0], ranks.text()
    steps = steps_of(example / "run")
    assert [line.step for line in steps if line.skipped] == [3]
    assert steps[2].gradient_norm is None
    assert all(np.isfinite([line.loss, line.gradient_norm]).all() for line in steps[3:])
    assert len(steps) == STEPS and len({line.cursor_crc for line in steps}) == STEPS
    manifest = example / "run" / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json"
    assert json.loads(manifest.read_text())["optimizer_step"] == STEPS - 1
    events = [x for x in read_every_line(example / "run" / "ledger.jsonl") if type(x) is EventLine]
    assert [(x.step, x.detail["in_a_row"]) for x in events if x.event == "skip"] == [(3, 1)]


def test_too_many_skipped_updates_in_a_row_end_the_run_for_good(
    nursery: Nursery, example: Path
) -> None:
    arguments = ["train", "run.yaml", "directory=run", "max_skipped_in_a_row=3"]
    ranks = Ranks(nursery, arguments, 2, example, fault="no_numbers")
    assert ranks.wait() == [93, 93], ranks.text()
    assert ranks.last_line() == (
        "megahybrid: max_skipped_in_a_row=3 updates were skipped because their gradients were not "
        "finite (last at step 3). Lower the learning rate or look at the data, then start from an "
        "earlier checkpoint."
    )
    assert [line.skipped for line in steps_of(example / "run")] == [True] * 3


def test_zero_stage_0_is_stage_1_in_loss_norm_and_clipping(nursery: Nursery, example: Path) -> None:
    runs = {}
    for stage in (0, 1):
        arguments = ["train", "run.yaml", f"directory=zero{stage}", f"parallel.zero_stage={stage}"]
        arguments += ["optimizer.clip_norm=0.2", "optimizer.eps=1e-5"]
        ranks = Ranks(nursery, arguments, 2, example)
        assert ranks.wait() == [0, 0], ranks.text()
        runs[stage] = steps_of(example / f"zero{stage}")
    assert min(line.gradient_norm or 0 for line in runs[1]) > 0.2  # clipping is active throughout
    for name in ("loss", "gradient_norm"):
        found, expected = ([getattr(line, name) for line in runs[stage]] for stage in (0, 1))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    for found, expected in zip(runs[0], runs[1], strict=True):
        kinds = expected.gradient_norm_by_kind
        assert found.gradient_norm_by_kind.keys() == kinds.keys()
        for kind, norm in kinds.items():
            np.testing.assert_allclose(found.gradient_norm_by_kind[kind], norm, rtol=1e-4)
