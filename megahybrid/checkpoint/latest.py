"""The choice of the checkpoint to resume from: the newest whose every byte is as it was written."""

import logging
from collections.abc import Callable
from pathlib import Path

from megahybrid.checkpoint.collective import Ranks
from megahybrid.checkpoint.folders import candidates
from megahybrid.checkpoint.reader import verify
from megahybrid.errors import CheckpointError

_log = logging.getLogger(__name__)


def latest(
    run_directory: Path | str,
    report: Callable[[str], None] = _log.warning,
    ranks: Ranks | None = None,
) -> Path | None:
    """The newest checkpoint that verifies, or None where there are none. Collective over `ranks`.

    A damaged one is reported in one line and the one before is tried. Where all are damaged
    CheckpointError is raised: to begin again from nothing is the user's decision, not ours. Its
    exit code is that of failing storage where one could not be read for that reason.
    """
    ranks = ranks or Ranks()
    damaged = []
    refusal: int | None = None
    # What rank 0 sees, for all: on a network file system another rank may see it a moment later.
    found = candidates(Path(run_directory)) if ranks.rank == 0 else []
    for path in map(Path, ranks.gather([str(path) for path in found])[0]):
        try:
            verify(path, ranks)
        except CheckpointError as error:
            damaged.append(path.name)
            refusal = refusal or error.system_errno
            report(f"Passing over {error}")
            continue
        return path
    if damaged:
        raise CheckpointError(
            f"{run_directory}: none of its {len(damaged)} checkpoints can be read "
            f"({', '.join(damaged)}). Restore one, or start again in another directory."
        ).because(refusal)
    return None
