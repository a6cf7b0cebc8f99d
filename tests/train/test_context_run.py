"""A whole run on context ranks: the rows, losses and weights of the run on one rank, through a kill
inside an exchange and a resume on other ranks."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from megahybrid.checkpoint.fragments import whole
from megahybrid.checkpoint.reader import Reader
from megahybrid.ledger import LEDGER_NAME, EvaluateEvent, read_ledger
from tests.train.example import STEPS, arithmetic_of, steps_of, steps_so_far
from tests.train.forked import Nursery, Ranks

BOUND = 1e-5  # of losses over these few steps, and of weights
# Short rows are one rank's own, long ones are shared; tokens per rank stay.
SHARED = ["parallel.context={64: 1, 128: 1, 512: 2}"]
TWICE = [f"stages.{index}.micro_batch_tokens=1024" for index in range(3)]


def trained(
    nursery: Nursery, folder: Path, directory: str, *more: str, ranks: int = 1, fault: str = ""
) -> list[int]:
    command = ["train", "run.yaml", f"directory={directory}", *TWICE, *more]
    launch = Ranks(nursery, command, ranks, folder, fault=fault or None)
    codes = launch.wait()
    assert fault or codes == [0] * ranks, launch.text()
    return codes


def held_out(run: Path) -> dict[tuple[int, str, int], float]:
    """The held-out losses by step, set and length."""
    lines = read_ledger(run / LEDGER_NAME).events
    return {
        (line.step, score.set, score.length): score.loss
        for line in lines
        if isinstance(score := line.content, EvaluateEvent) and score.loss is not None
    }


def rows_of(run: Path) -> list[tuple[int, int, int, dict[str, int]]]:
    """Of each step, which rows it had."""
    return [(s.step, s.length, s.cursor_crc, s.source_tokens) for s in steps_of(run)]


def assert_same_run(run: Path, expected: Path, first: int = 0) -> None:
    """The same rows; losses, norms and the last weights within the bound."""
    assert rows_of(run) == rows_of(expected)
    for ours, theirs in zip(steps_of(run)[first:], steps_of(expected)[first:], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=BOUND), ours.step
        assert ours.gradient_norm == pytest.approx(theirs.gradient_norm, rel=1e-4), ours.step
    step = f"checkpoints/step-{STEPS:08d}"
    with Reader(run / step) as a, Reader(expected / step) as b:
        for name, tensor in a.manifest.tensors.items():
            box = whole(tensor.shape)
            x, y = (reader.read(name, "weight", box) for reader in (a, b))
            assert np.linalg.norm(x - y) <= 1e-4 * np.linalg.norm(y), name


def test_a_run_on_context_ranks_is_that_of_one_rank(nursery: Nursery, example: Path) -> None:
    trained(nursery, example, "alone")
    trained(nursery, example, "shared", *SHARED, ranks=2)
    assert_same_run(example / "shared", example / "alone")
    ours, theirs = held_out(example / "shared"), held_out(example / "alone")
    assert ours.keys() == theirs.keys() and len(ours) > 3
    for where, loss in ours.items():
        assert loss == pytest.approx(theirs[where], rel=1e-4), where

    # Killed while an exchange is under way: the other rank ends too, and the run goes on.
    codes = trained(nursery, example, "killed", *SHARED, ranks=2, fault="killed_in_an_exchange")
    assert codes[1] == -9 and codes[0] not in (0, 2), codes
    assert 4 < steps_so_far(example / "killed") < STEPS
    shutil.copytree(example / "killed", example / "moved")
    trained(nursery, example, "killed", *SHARED, ranks=2)
    assert arithmetic_of(example / "killed") == arithmetic_of(example / "shared")

    # On ranks that share nothing, and with tensor ranks beside.
    trained(nursery, example, "moved", "parallel.tensor=2", "parallel.context=2", ranks=4)
    assert_same_run(example / "moved", example / "alone")
