"""A run that was killed and resumed is the run that was not, to the bit."""

import json
import random
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.train.example import (
    STEPS,
    arithmetic_of,
    checkpoint_bytes,
    steps_of,
    steps_so_far,
)
from tests.train.forked import Nursery, Ranks

LAYOUTS = {
    "single": (1, ["parallel.zero_stage=1"]),
    "tensor2-zero1": (2, ["parallel.tensor=2"]),
    "data2-zero2": (2, ["parallel.zero_stage=2"]),
    "data2-zero3": (2, ["parallel.zero_stage=3"]),
    "tensor2-zero3-bf16": (2, ["parallel.tensor=2", "parallel.zero_stage=3", "precision=bf16"]),
}
KILLS = 4


def finish(nursery: Nursery, folder: Path, directory: str, world: int, *more: str) -> None:
    ranks = Ranks(nursery, ["train", "run.yaml", f"directory={directory}", *more], world, folder)
    assert ranks.wait() == [0] * world, ranks.text()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_killed_again_and_again_ends_with_the_same_bits(
    layout: str, nursery: Nursery, example: Path
) -> None:
    world, overrides = LAYOUTS[layout]
    finish(nursery, example, "whole", world, *overrides)

    draw = random.Random(layout)
    arguments = ["train", "run.yaml", "directory=killed", *overrides]
    run = example / "killed"
    for kill in range(KILLS):
        ranks = Ranks(nursery, arguments, world, example)
        # The last lines tell of a step just done; what follows is a save, a step or a validation.
        target = steps_so_far(run) + draw.randint(1, 5)
        if kill == 0:
            alive = ranks.until(lambda: any((run / "checkpoints").glob(".step-*.tmp")))
        else:
            alive = ranks.until(lambda target=target: steps_so_far(run) >= target)
        if not alive:
            assert ranks.wait() == [0] * world, ranks.text()
            break
        ranks.send(signal.SIGKILL, draw.randrange(world))
        assert -signal.SIGKILL in ranks.wait(10), ranks.text()
    finish(nursery, example, "killed", world, *overrides)

    assert steps_of(run)[-1].attempt > 1
    assert arithmetic_of(run) == arithmetic_of(example / "whole")
    assert len(arithmetic_of(run)) == STEPS
    ends = [4, 10, STEPS]  # of the stages
    for step in ends:
        assert checkpoint_bytes(run, step) == checkpoint_bytes(example / "whole", step)
    assert checkpoint_bytes(run)


CHANGES = {
    "tensor2-zero1 to single": ("tensor2-zero1", "single"),
    "data2-zero2 to tensor2-zero1": ("data2-zero2", "tensor2-zero1"),
    "single to data2-zero3": ("single", "data2-zero3"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_goes_on_with_another_layout(change: str, nursery: Nursery, example: Path) -> None:
    """Five steps over a stage boundary, then the rest; AdamW's eps as in the bounds' definition."""
    before, after = (LAYOUTS[name] for name in CHANGES[change])
    same = ["optimizer.eps=1e-5"]
    finish(nursery, example, "whole", before[0], *before[1], *same)
    arguments = ["train", "run.yaml", "directory=moved", *before[1], *same]
    ranks = Ranks(nursery, arguments, before[0], example, fault="slow_steps")
    assert ranks.until(lambda: steps_so_far(example / "moved") >= 7)
    ranks.send(signal.SIGTERM)
    assert ranks.wait() == [75] * before[0], ranks.text()
    finish(nursery, example, "moved", after[0], *after[1], *same)

    expected, found = steps_of(example / "whole"), steps_of(example / "moved")
    assert [s.cursor_crc for s in found] == [s.cursor_crc for s in expected]
    resumed = max(s.step for s in found if s.attempt == 1)
    for name in ("loss", "gradient_norm"):
        a = np.array([getattr(s, name) for s in expected[resumed:]])
        b = np.array([getattr(s, name) for s in found[resumed:]])
        np.testing.assert_allclose(b, a, rtol=1e-5)


def test_a_finished_run_stays_as_it_is(nursery: Nursery, example: Path) -> None:
    finish(nursery, example, "done", 1)
    before = {p: p.read_bytes() for p in (example / "done" / "checkpoints").rglob("*.*")}
    finish(nursery, example, "done", 1)
    assert before == {p: p.read_bytes() for p in (example / "done" / "checkpoints").rglob("*.*")}
    assert len(steps_of(example / "done")) == STEPS
    lines = [json.loads(x) for x in (example / "done" / "ledger.jsonl").read_text().splitlines()]
    second = [line for line in lines if line["attempt"] == 2]
    assert [line["event"] for line in second] == ["resume", "end"]
