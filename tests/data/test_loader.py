import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megahybrid.data import loader as loader_module
from megahybrid.data.loader import BatchLoader, StepShape, read_step
from megahybrid.data.mixture import Mixture
from megahybrid.errors import DataError
from tests.data.corpus import write_corpus

SHAPES = [StepShape(16, 4, 2), StepShape(32, 2, 1), StepShape(16, 4, 4), StepShape(8, 8, 2)]


@pytest.fixture
def runs(tmp_path: Path) -> Mixture:
    datasets = {
        name: write_corpus(tmp_path / name, [30, 7, 90, 100, 41] * 4, seed=seed)
        for seed, name in enumerate(("a", "b"))
    }
    return Mixture(datasets, {"a": 2, "b": 1}, seed=1, block_tokens=64, lanes=4)


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_each_step_carries_the_state_after_itself(runs: Mixture, prefetch: int) -> None:
    state = runs.start()
    with BatchLoader(runs, state, SHAPES, prefetch=prefetch) as loader:
        for shape, step in zip(SHAPES, loader, strict=True):
            time.sleep(0.02)  # let it read far ahead: the state must not
            expected = read_step(runs, state, shape).micro_batches
            plans, state = runs.plan_step(state, shape.length, shape.rows)
            assert (step.plans, step.state, step.shape) == (tuple(plans), state, shape)
            assert step.wait_seconds >= 0
            for ours, theirs in zip(step.micro_batches, expected, strict=True):
                assert (ours.tokens == theirs.tokens).all()
        with pytest.raises(StopIteration):
            next(loader)


def test_resume_from_any_step_goes_on_with_the_same_rows(runs: Mixture) -> None:
    with BatchLoader(runs, runs.start(), SHAPES) as loader:
        steps = list(loader)
    for done in range(1, len(SHAPES)):
        with BatchLoader(runs, steps[done - 1].state, SHAPES[done:]) as loader:
            for expected, step in zip(steps[done:], loader, strict=True):
                assert step.cursor_crc == expected.cursor_crc
                for ours, theirs in zip(step.micro_batches, expected.micro_batches, strict=True):
                    assert (ours.tokens == theirs.tokens).all()


def test_error_of_a_step_is_raised_at_that_step(runs: Mixture) -> None:
    shapes = [*SHAPES[:2], StepShape(65, 1, 1), *SHAPES]
    with BatchLoader(runs, runs.start(), shapes, prefetch=4) as loader:
        next(loader)
        next(loader)
        with pytest.raises(DataError, match="block_tokens=64 is smaller"):
            next(loader)


def test_closing_ends_the_thread_even_when_nobody_reads(runs: Mixture) -> None:
    def endless() -> Iterator[StepShape]:
        while True:
            yield SHAPES[0]

    before = threading.active_count()
    loader = BatchLoader(runs, runs.start(), endless())
    next(loader)
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(loader)


def test_ranks_share_a_step_row_by_row(runs: Mixture) -> None:
    whole = read_step(runs, runs.start(), StepShape(16, 8, 8)).micro_batches[0].tokens
    for rank in range(2):
        step = read_step(runs, runs.start(), StepShape(16, 8, 2), rank=rank, world_size=2)
        mine = np.concatenate([batch.tokens for batch in step.micro_batches])
        assert (mine == whole[rank::2]).all()


def test_killed_thread_is_replaced_and_the_rows_stay(
    runs: Mixture, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = list(BatchLoader(runs, runs.start(), SHAPES, prefetch=0))
    kills = iter([False, True, True, False, False, True])
    read = loader_module.read_step

    def read_or_die(*args: object, **options: object) -> object:
        if next(kills, False):
            raise SystemExit
        return read(*args, **options)

    monkeypatch.setattr(loader_module, "read_step", read_or_die)
    with BatchLoader(runs, runs.start(), SHAPES, prefetch=2, stall_seconds=0.05) as loader:
        for ours, theirs in zip(loader, expected, strict=True):
            assert (ours.plans, ours.state) == (theirs.plans, theirs.state)
    assert "was killed; another one goes on" in caplog.text


def test_stalled_read_is_named(
    runs: Mixture, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    named = "the next step (4 rows of 16) has been waited for"
    read = loader_module.read_step

    def stall(*args: object, **options: object) -> object:
        until = time.monotonic() + 30
        while named not in caplog.text and time.monotonic() < until:
            time.sleep(0.01)
        return read(*args, **options)

    monkeypatch.setattr(loader_module, "read_step", stall)
    with BatchLoader(runs, runs.start(), SHAPES, stall_seconds=0.1) as loader:
        assert next(loader).wait_seconds >= 0.1
    assert named in caplog.text
    assert str(runs.datasets["a"].path) in caplog.text
