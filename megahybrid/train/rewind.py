"""Going back before a spike: training starts again from the newest checkpoint, at the data that
follows the spike.

What made a spike began before it showed, so PaLM (arXiv 2204.02311, sec. 5.1) went back to an
earlier checkpoint and passed over the data in between. The checkpoint stays as it is; the new
position stands in the ledger's event, where an attempt that begins at that step finds it.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from megahybrid.errors import CheckpointError, NoProgressError
from megahybrid.ledger import LEDGER_NAME, RewindEvent, read_ledger
from megahybrid.train.restore import ResumePoint
from megahybrid.train.state import TrainState


def past_spikes(directory: Path, start: ResumePoint) -> ResumePoint:
    """Return the same start at the data where the last rewind to its step stood."""
    rewinds = _rewinds_to(directory, start.state.step)
    if not rewinds:
        return start
    return replace(start, state=replace(start.state, data=rewinds[-1]))


def go_back(
    directory: Path, start: ResumePoint, spike: TrainState, reason: str, most: int
) -> tuple[ResumePoint, RewindEvent]:
    """Return `start` at the data after `spike`, and the event that the ledger is to hold.

    Raises NoProgressError where the run has gone back to the same step `most` times.
    """
    step, times = start.state.step, len(_rewinds_to(directory, start.state.step))
    if times >= most:
        raise NoProgressError(
            f"max_skipped_in_a_row={most} times the run went back to step {step} because of a "
            f"{reason} (last at step {spike.step}). Lower the learning rate or look at the data, "
            "then start from an earlier checkpoint."
        )
    event = RewindEvent(from_step=spike.step, reason=reason, times=times + 1, data=spike.data)
    return replace(start, state=replace(start.state, data=spike.data)), event


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
