"""Nothing is an alarm that was meant: changes that were tried and taken back, another layout for a
while, data made anew. A false one would end a run of weeks."""

import shutil
import signal
from pathlib import Path

import numpy as np

from megahybrid.data.token_writer import TokenWriter
from megahybrid.ledger import LEDGER_NAME, read_ledger
from tests.events import named
from tests.train.example import STEPS, TOKENIZER, arithmetic_of
from tests.train.forked import Nursery, Ranks


def killed(
    fault: str, newest: int, example: Path, nursery: Nursery, *more: str, world: int = 1
) -> None:
    """An attempt that dies in the step of its own that `fault` names; checkpoints after that of
    `newest` are taken away."""
    at_once = ("checkpoint.asynchronous=false", *more)
    ranks = Ranks(
        nursery, ["train", "run.yaml", "directory=run", *at_once], world, example, fault=fault
    )
    assert -signal.SIGKILL in ranks.wait(), ranks.text()
    for folder in (example / "run/checkpoints").glob("step-*"):
        if folder.name > f"step-{newest:08d}":
            shutil.rmtree(folder)


def ends_without_a_word(
    example: Path, nursery: Nursery, *more: str, world: int = 1, code: int = 0
) -> None:
    ranks = Ranks(nursery, ["train", "run.yaml", "directory=run", *more], world, example)
    assert ranks.wait() == [code] * world, ranks.text()
    ledger = read_ledger(example / "run" / LEDGER_NAME)
    assert not named(ledger, "repeat_differs"), named(ledger, "repeat_differs")
    assert not named(ledger, "warning")
    assert len(arithmetic_of(example / "run")) == STEPS


def test_weights_that_were_tried_and_taken_back(nursery: Nursery, example: Path) -> None:
    """Steps 7 and 8 had other data meanwhile: those after stand elsewhere than they did."""
    killed("killed_in_thirteenth_step", 6, example, nursery, "checkpoint.every_steps=6")
    tried = ("checkpoint.every_steps=2", "stages.1.weights.code=7", "--allow", "stages.1.weights")
    killed("killed_in_third_step", 8, example, nursery, *tried)
    ends_without_a_word(example, nursery, "--allow", "stages.1.weights")


def test_a_rate_that_was_tried_and_taken_back(nursery: Nursery, example: Path) -> None:
    killed("killed_in_thirteenth_step", 6, example, nursery, "checkpoint.every_steps=6")
    allow = ("--allow", "stages.1.learning_rate")
    tried = ("checkpoint.every_steps=2", "stages.1.learning_rate.start=5.0e-3", *allow)
    killed("killed_in_third_step", 8, example, nursery, *tried)
    ends_without_a_word(example, nursery, *allow)


def test_another_layout_for_a_while(nursery: Nursery, example: Path) -> None:
    """The last bits of step 8 are another sum's, so those after need not be the same."""
    eps = "optimizer.eps=1e-5"
    killed(
        "killed_in_thirteenth_step", 6, example, nursery, eps, "checkpoint.every_steps=6", world=2
    )
    killed(
        "killed_in_third_step",
        8,
        example,
        nursery,
        eps,
        "checkpoint.every_steps=2",
        "parallel.tensor=1",
    )
    ends_without_a_word(example, nursery, eps, world=2)


def write_source(folder: Path, seed: int, documents: int) -> None:
    draw = np.random.default_rng(seed)
    shutil.rmtree(folder)
    with TokenWriter(folder, TOKENIZER) as writer:
        for length in draw.integers(5, 700, documents):
            writer.add((np.cumsum(draw.integers(0, 3, length)) + draw.integers(95)) % 95 + 2)


def test_data_made_anew_before_the_first_checkpoint(nursery: Nursery, example: Path) -> None:
    killed("killed_in_third_step", 0, example, nursery)
    write_source(example / "books", 5, 30)
    ends_without_a_word(example, nursery)


def test_data_made_anew_before_their_stage_is_in_a_checkpoint(
    nursery: Nursery, example: Path
) -> None:
    """As with a change of data.sources: what no checkpoint has begun to read may still change."""
    killed("killed_in_seventh_step", 3, example, nursery)
    write_source(example / "code", 6, 40)
    ends_without_a_word(example, nursery)
