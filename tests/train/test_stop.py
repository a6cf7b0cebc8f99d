"""Asked to stop, a run saves at the end of its step and says 75; the same command goes on."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megahybrid.train.ledger import EventLine, read_every_line
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


WHILE: dict[str, tuple[list[str], str, Callable[[Path], bool]]] = {
    "validation": (
        ["evaluate.every_steps=2"],
        "slow_validation",
        lambda run: (run / "validating").exists(),
    ),
    "a save": (["checkpoint.every_steps=2"], "slow_save", lambda run: (run / "saving").exists()),
}


@pytest.mark.parametrize("what", WHILE)
def test_a_stop_asked_during(what: str, nursery: Nursery, example: Path) -> None:
    """acts at the next step's end at the latest, and what went on is finished first."""
    overrides, fault, begun = WHILE[what]
    run = example / "run"
    run.mkdir()
    arguments = [*TENSOR, "directory=run", *overrides]
    ranks = Ranks(nursery, arguments, 2, example, fault=fault)
    assert ranks.until(lambda: begun(run)), ranks.text()
    ranks.send(signal.SIGTERM)
    assert ranks.wait(20) == [75, 75], ranks.text()
    assert [line.step for line in steps_of(run)] == [1, 2, 3]
    assert told(run, {"validation": "evaluate", "a save": "save"}[what]) >= 1
    assert (run / "checkpoints" / "step-00000003" / "manifest.json").exists()


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
