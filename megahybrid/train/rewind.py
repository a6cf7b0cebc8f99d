"""Back before a spike: the newest checkpoint again, at the data that follows the spike.

What made a spike began before it showed, so PaLM (arXiv 2204.02311, sec. 5.1) went back to an
earlier checkpoint and passed over the data in between. The checkpoint stays as it is; the new
position stands in the ledger's event, where an attempt that begins at that step finds it.

A spike is a step that would do harm: a loss or gradient norm far outside of what the last steps
had.

The rule is OLMo's (SkipStepOptimizer): more than so many standard deviations above the mean of the
last so many steps, once half of them are there. Every rank judges the same numbers alike.
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megahybrid.config.training import SpikeConfig
from megahybrid.errors import CheckpointError, NoProgressError
from megahybrid.ledger import LEDGER_NAME, RewindEvent, read_ledger
from megahybrid.train.restore import Beginning
from megahybrid.train.state import TrainState

Recent = tuple[tuple[float, float], ...]  # (loss, gradient norm) of steps not skipped


def judge_spike(rule: SpikeConfig, recent: Recent, loss: float, norm: float) -> str | None:
    """Why a step is a spike, in words; None when it is none."""
    if len(recent) < max(2, rule.over_steps // 2):
        return None
    columns = zip(*recent, strict=True)
    for name, value, seen in zip(("loss", "gradient norm"), (loss, norm), columns, strict=True):
        excess = _deviations(value, seen)
        if excess > rule.sigmas:
            return (
                f"spike: {name} {value:.4g} is {excess:.1f} deviations above the mean "
                f"{statistics.fmean(seen):.4g} of the last {len(recent)} steps"
            )
    return None


def remember(rule: SpikeConfig, recent: Recent, loss: float, norm: float) -> Recent:
    """The last steps with one more. Refused steps are not remembered: one would blind the rule."""
    return (*recent, (loss, norm))[-rule.over_steps :]


def _deviations(value: float, seen: Sequence[float]) -> float:
    spread = statistics.pstdev(seen)
    above = value - statistics.fmean(seen)
    if spread == 0:
        return float("inf") if above > 0 else 0.0
    return above / spread


def past_spikes(directory: Path, beginning: Beginning) -> Beginning:
    """A beginning at the data where the last rewind to its step stood."""
    rewinds = _rewinds_to(directory, beginning.state.step)
    if not rewinds:
        return beginning
    return replace(beginning, state=replace(beginning.state, data=rewinds[-1]))


def go_back(
    directory: Path, beginning: Beginning, spike: TrainState, reason: str, most: int
) -> tuple[Beginning, RewindEvent]:
    """`beginning` at the data after `spike`, and the event that the ledger is to hold.

    Raises NoProgressError where the run has gone back to the same step `most` times.
    """
    step, times = beginning.state.step, len(_rewinds_to(directory, beginning.state.step))
    if times >= most:
        raise NoProgressError(
            f"max_skipped_in_a_row={most} times the run went back to step {step} because of a "
            f"{reason} (last at step {spike.step}). Lower the learning rate or look at the data, "
            "then start from an earlier checkpoint."
        )
    event = RewindEvent(from_step=spike.step, reason=reason, times=times + 1, data=spike.data)
    return replace(beginning, state=replace(beginning.state, data=spike.data)), event


def _rewinds_to(directory: Path, step: int) -> list[dict[str, Any]]:
    """The data that each rewind to a step went on with."""
    path = directory / LEDGER_NAME
    if not path.exists():
        return []
    rewinds = [line for line in read_ledger(path).events if line.goes_back and line.step == step]
    found = [
        line.content.data
        for line in rewinds
        if isinstance(line.content, RewindEvent) and line.content.data is not None
    ]
    if len(found) < len(rewinds):
        raise CheckpointError(
            f"{path}: the rewind to step {step} does not say with which data it went on "
            "(detail.data). Restore the ledger, or start from an earlier checkpoint."
        )
    return found
