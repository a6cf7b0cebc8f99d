"""The names in `RUN/checkpoints`, what each means, and which of them may be deleted.

`step-00001234` is published. `.step-00001234.tmp` is being written or deleted, and is nobody's.
`.step-00001234.replaced` is a published one that a save of the same step has just put aside: it
still counts while no `step-00001234` stands in its place.
"""

import re
from collections.abc import Collection
from pathlib import Path

from megahybrid.checkpoint import durable
from megahybrid.checkpoint.reader import quick_check, verify
from megahybrid.errors import CheckpointError

_PUBLISHED = re.compile(r"(\.?)step-(\d{8,})(\.replaced)?")
_TEMPORARY = re.compile(r"\.step-\d{8,}\.tmp")


def checkpoints_of(run_directory: Path) -> Path:
    """The folder that holds a run's checkpoints."""
    return Path(run_directory) / "checkpoints"


def published_path(run_directory: Path, step: int) -> Path:
    """Where the checkpoint of a step stands when it is complete."""
    return checkpoints_of(run_directory) / f"step-{step:08d}"


def temporary_path(run_directory: Path, step: int) -> Path:
    """Where the checkpoint of a step is written."""
    return checkpoints_of(run_directory) / f".step-{step:08d}.tmp"


def replaced_path(run_directory: Path, step: int) -> Path:
    """Where a checkpoint waits while another of the same step takes its place."""
    return checkpoints_of(run_directory) / f".step-{step:08d}.replaced"


def candidates(run_directory: Path) -> list[Path]:
    """Every folder that may be a checkpoint, the one to prefer first: by step, newest first."""
    found = []
    folder = checkpoints_of(run_directory)
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _PUBLISHED.fullmatch(path.name)
        if match and bool(match[1]) == bool(match[3]) and path.is_dir():
            found.append((int(match[2]), not match[3], path))
    return [path for *_, path in sorted(found, reverse=True)]


def reap(run_directory: Path) -> list[str]:
    """Delete what an interrupted save left behind; returns the names. Only the run's owner may."""
    folder = checkpoints_of(run_directory)
    gone = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if _TEMPORARY.fullmatch(path.name):
            durable.remove(path)
            gone.append(path.name)
        elif path.name.endswith(".replaced") and _PUBLISHED.fullmatch(path.name):
            original = folder / path.name.removeprefix(".").removesuffix(".replaced")
            if not original.exists():
                durable.rename(path, original)
            elif not quick_check(original):
                durable.remove(path)
                gone.append(path.name)
    return gone


def retain(run_directory: Path, keep_last: int, verified: Collection[Path] = ()) -> list[str]:
    """Delete all but the newest `keep_last` good checkpoints; returns the names deleted.

    Damaged ones do not count. Nothing is deleted before the bytes of one that stays have been
    verified, here or (those in `verified`) by the caller; the others that stay are only looked at.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last={keep_last} would delete the last checkpoint")
    proven, kept, gone = False, 0, []
    for path in candidates(run_directory):
        if kept >= keep_last and proven:
            hidden = path.with_name(f".{path.name.strip('.').removesuffix('.replaced')}.tmp")
            durable.rename(path, hidden)
            durable.remove(hidden)
            gone.append(path.name)
        elif path in verified or (not proven and _verifies(path)):
            proven, kept = True, kept + 1
        elif proven and not quick_check(path):
            kept += 1
    return gone


def _verifies(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True
