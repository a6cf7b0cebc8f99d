"""The names in `RUN/checkpoints`, what each means, and which of them may be deleted.

`step-00001234` is published. `.step-00001234.tmp` is being written or deleted, and is nobody's.
`.step-00001234.replaced` is a published one that a save of the same step has just put aside: it
still counts while no `step-00001234` stands in its place.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megahybrid.checkpoint import durable
from megahybrid.checkpoint.reader import quick_check, verify
from megahybrid.errors import CheckpointError

_PUBLISHED = re.compile(r"(\.?)step-(\d{8,})(\.replaced)?")
_TEMPORARY = re.compile(r"\.step-\d{8,}\.tmp")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `keep_last`, those of every `keep_every_steps` steps, and
    the one whose step has the lowest loss in `scores`."""

    keep_last: int = 3
    keep_every_steps: int | None = None
    scores: Mapping[int, float] = field(default_factory=dict)

    def spares(self, step: int, steps: Collection[int]) -> bool:
        """Whether a checkpoint stays however old it is; `steps` are those of all there are."""
        if self.keep_every_steps is not None and step % self.keep_every_steps == 0:
            return True
        scored = [each for each in steps if each in self.scores]
        # Of equals the newer one: it has seen more.
        return bool(scored) and step == min(scored, key=lambda each: (self.scores[each], -each))


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


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    match = _PUBLISHED.fullmatch(path.name)
    assert match is not None, path
    return int(match[2])


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


def retain(run_directory: Path, retention: Retention, verified: Collection[Path] = ()) -> list[str]:
    """Delete the checkpoints that `retention` does not keep; returns the names deleted.

    Damaged ones do not count. Nothing is deleted before the bytes of one that stays have been
    verified, here or (those in `verified`) by the caller; the others that stay are only looked at.
    """
    if retention.keep_last < 1:
        raise ValueError(f"keep_last={retention.keep_last} would delete the last checkpoint")
    proven, kept, gone = False, 0, []
    found = candidates(run_directory)
    steps = {path: step_of(path) for path in found}
    whole = {step for path, step in steps.items() if not quick_check(path)}
    for path in found:
        if kept >= retention.keep_last and proven:
            if steps[path] in whole and retention.spares(steps[path], whole):
                continue
            hidden = temporary_path(run_directory, steps[path])
            durable.rename(path, hidden)
            durable.remove(hidden)
            gone.append(path.name)
        elif path in verified or (not proven and _verifies(path)):
            proven, kept = True, kept + 1
        elif proven and steps[path] in whole:
            kept += 1
    return gone


def withdraw(run_directory: Path, step: int) -> None:
    """Take back a checkpoint that turned out damaged; the one it replaced stands there again."""
    published, hidden = published_path(run_directory, step), temporary_path(run_directory, step)
    durable.rename(published, hidden)
    durable.remove(hidden)
    if (waiting := replaced_path(run_directory, step)).exists():
        durable.rename(waiting, published)


def _verifies(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True
