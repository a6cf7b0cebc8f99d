"""Asked to stop, a run saves at the end of its step and says 75; the same command goes on."""

import signal
from pathlib import Path

import pytest

from megahybrid.ledger import EventLine, read_every_line
from tests.train.example import STEPS, arithmetic_of, checkpoint_bytes, steps_of, steps_so_far
from tests.train.forked import Nursery, Ranks

TENSOR = ["train", "run.yaml", "parallel.tensor=2"]


def told(run: Path, event: str) -> int:
    """How often the ledger tells of an event."""
    path = run / "ledger.jsonl"
    lines = read_every_line(path) if path.exists() else ()
    return sum(isinstance(line, EventLine) and line.event == event for line in lines)


def test_ranks_stop_when_one_or_all_are_told_and_the_run_is_the_same(
    nursery: Nursery, example: Path
) -> None:
    run = example / "stopped"
    whole = Ranks(nursery, [*TENSOR, "directory=whole"], 2, example)
    assert whole.wait() == [0, 0], whole.text()

    def stop(after: int, *signals: tuple[signal.Signals, tuple[int, ...]]) -> Ranks:
        ranks = Ranks(nursery, [*TENSOR, "directory=stopped"], 2, example, fault="slow_steps")
        assert ranks.until(lambda: steps_so_far(run) >= after), ranks.text()
        for number, receivers in signals:
            ranks.send(number, *receivers)
        assert ranks.wait(20) == [75, 75], ranks.text()
        assert told(run, "end") and steps_of(run)[-1].step - after <= 2
        newest = max((run / "checkpoints").glob("step-*"))
        assert newest.name == f"step-{steps_of(run)[-1].step:08d}"
        return ranks

    ranks = stop(2, (signal.SIGTERM, (1,)))
    assert ranks.last_line() == (
        "megahybrid: run stopped stopped early and saved; the same command goes on with it."
    )
    stop(steps_so_far(run) + 1, (signal.SIGUSR1, (0,)))
    # Impatience, and a terminal that sends to the whole group: nothing is lost by it.
    many = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP] * 8
    stop(steps_so_far(run) + 1, *((number, ()) for number in many))
    # The line of the last step but one: the stop falls on the stage's end, or right after it.
    stop(9, (signal.SIGTERM, ()))
    last = Ranks(nursery, [*TENSOR, "directory=stopped"], 2, example)
    assert last.wait() == [0, 0], last.text()
    assert arithmetic_of(run) == arithmetic_of(example / "whole")
    assert checkpoint_bytes(run) == checkpoint_bytes(example / "whole")
    ends = [
        (line.step, line.detail["rows"])
        for line in read_every_line(run / "ledger.jsonl")
        if isinstance(line, EventLine)
        and line.event == "evaluate"
        and line.detail["rows"] == "documents"
    ]
    assert ends == [(4, "documents"), (10, "documents"), (STEPS, "documents")]


# The fault that makes it long, options that bring it about, and the steps done when it is left.
WHILE: dict[str, tuple[str, list[str], int]] = {
    "start": ("slow_start", [], 0),
    "compilation": ("slow_first_step", ["stages.0.micro_batch_tokens=64"], 0),
    "compilation at ZeRO 3": (
        "slow_first_step",
        ["stages.0.micro_batch_tokens=64", "parallel.tensor=1", "parallel.zero_stage=3"],
        0,
    ),
    "waiting for data": ("no_data_on_one_rank", [], 3),
    "validation": ("slow_validation", ["evaluate.every_steps=2"], 2),
    "a save": (
        "slow_save",
        ["checkpoint.every_steps=2", "checkpoint.asynchronous=false"],
        2,
    ),
}


@pytest.mark.parametrize("what", WHILE)
def test_a_stop_asked_during(what: str, nursery: Nursery, example: Path) -> None:
    """leaves it at once, with every step saved and none lost or done twice."""
    fault, overrides, steps = WHILE[what]
    run = example / "run"
    run.mkdir()
    arguments = [*TENSOR, "directory=run", "evaluate.max_tokens=8192", *overrides]
    ranks = Ranks(nursery, arguments, 2, example, fault=fault)
    begun = ranks.until(lambda: (run / "begun").exists() and steps_so_far(run) >= steps)
    assert begun, ranks.text()
    ranks.send(signal.SIGTERM, 1)
    # A step of that compilation takes 8 s, that validation longer, and the disk never answers.
    assert ranks.wait(7) == [75, 75], ranks.text()
    assert [line.step for line in steps_of(run)] == list(range(1, steps + 1))
    assert (run / "checkpoints" / f"step-{steps:08d}" / "manifest.json").exists()
    assert told(run, "save") == 1
    if "compilation" not in what and what != "validation":
        return
    again = Ranks(nursery, arguments, 2, example)
    assert again.wait() == [0, 0], again.text()
    whole = Ranks(nursery, [*arguments, "directory=whole"], 2, example)
    assert whole.wait() == [0, 0], whole.text()
    assert arithmetic_of(run) == arithmetic_of(example / "whole")
    # What was left of a validation is done by the attempt that goes on.
    assert validations(run) == validations(example / "whole")


def validations(run: Path) -> set[tuple[int, str, float]]:
    """Every score: step, rows and loss."""
    return {
        (line.step, line.detail["rows"], line.detail["loss"])
        for line in read_every_line(run / "ledger.jsonl")
        if isinstance(line, EventLine) and line.event == "evaluate"
    }


def test_a_stop_at_the_very_end_leaves_nothing_to_train(nursery: Nursery, example: Path) -> None:
    """The last step is done when the stop comes: the last validation is made up for."""
    run = example / "run"
    arguments = ["train", "run.yaml", "directory=run"]
    ranks = Ranks(nursery, arguments, 1, example, fault="stop_in_last_step")
    assert ranks.wait() == [75], ranks.text()
    assert steps_of(run)[-1].step == STEPS
    scored = told(run, "evaluate")
    again = Ranks(nursery, arguments, 1, example)
    assert again.wait() == [0], again.text()
    assert len(steps_of(run)) == STEPS
    assert told(run, "evaluate") == scored + 2  # stream and documents
