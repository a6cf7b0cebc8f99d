"""The checkpoints in `RUN/checkpoints`: which there are, in order, and which may be deleted."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megahybrid.checkpoint import durable
from megahybrid.checkpoint.manifest import MANIFEST_NAME, Misnamed
from megahybrid.checkpoint.names import (
    PUBLISHED,
    TEMPORARY,
    checkpoints_of,
    published_path,
    replaced_path,
    step_of,
    temporary_path,
)
from megahybrid.checkpoint.reader import check_sizes, quick_check, verify
from megahybrid.errors import CheckpointError
from megahybrid.run_folder import refuse_foreign_run_folder


@dataclass(frozen=True)
class Retention:
    """The rule for which checkpoints stay.

    The newest `keep_last`, those of every `keep_every_steps` steps, and the one whose step has the
    lowest loss in `scores`.
    """

    keep_last: int = 3
    keep_every_steps: int | None = None
    scores: Mapping[int, float] = field(default_factory=dict)

    def spares(self, step: int, steps: Collection[int]) -> bool:
        """Return whether a checkpoint stays however old it is.

        `steps` are those of all checkpoints there are.
        """
        if self.keep_every_steps is not None and step % self.keep_every_steps == 0:
            return True
        scored = [each for each in steps if each in self.scores]
        # Of equals the newer one: it has seen more.
        return bool(scored) and step == min(scored, key=lambda each: (self.scores[each], -each))


def candidates(run_directory: Path) -> list[Path]:
    """Every folder that may be a checkpoint, the one to prefer first: by step, newest first."""
    found = []
    folder = checkpoints_of(run_directory)
    for path in folder.iterdir() if folder.is_dir() else ():
        match = PUBLISHED.fullmatch(path.name)
        if match and bool(match[1]) == bool(match[3]) and path.is_dir():
            found.append((int(match[2]), not match[3], path))
    return [path for *_, path in sorted(found, reverse=True)]


def refuse_occupied(out: Path, why: str) -> None:
    """Raise CheckpointError where a checkpoint that a command makes would stand in `out` beside
    others, and `why` it must not; ConfigError where `out` holds something that is no run's."""
    if candidates(out) or (out / MANIFEST_NAME).exists():
        raise CheckpointError(
            f"--out={out} holds checkpoints already, and {why}. Name another folder."
        )
    refuse_foreign_run_folder(out, "--out")


def remove_leftovers(run_directory: Path) -> list[str]:
    """Delete what an interrupted save left behind; returns the names. Only the run's owner may."""
    folder = checkpoints_of(run_directory)
    gone = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if TEMPORARY.fullmatch(path.name):
            durable.remove(path)
            gone.append(path.name)
        elif path.name.endswith(".replaced") and PUBLISHED.fullmatch(path.name):
            original = folder / path.name.removeprefix(".").removesuffix(".replaced")
            if not original.exists():
                durable.rename(path, original)
            elif not quick_check(original):
                durable.remove(path)
                gone.append(path.name)
    return gone


def apply_retention(
    run_directory: Path, retention: Retention, verified: Collection[Path] = ()
) -> list[str]:
    """Delete the checkpoints that `retention` does not keep; returns the names deleted.

    Damaged ones do not count. Those that hold another step than their name says do not count and
    are never deleted: somebody put them there. Nothing is deleted before the bytes of one that
    stays have been verified, here or (those in `verified`) by the caller; the others that stay are
    only looked at.
    """
    if retention.keep_last < 1:
        raise ValueError(f"keep_last={retention.keep_last} would delete the last checkpoint")
    proven, kept, gone = False, 0, []
    looks = {path: _condition(path) for path in candidates(run_directory)}
    found = [path for path, look in looks.items() if look != "misnamed"]
    steps = {path: step_of(path) for path in found}
    whole = {step for path, step in steps.items() if looks[path] == "whole"}
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


def _condition(path: Path) -> Literal["whole", "damaged", "misnamed"]:
    """Return the condition of a folder, by its manifest, its name and the sizes of its files."""
    try:
        check_sizes(path)
    except Misnamed:
        return "misnamed"
    except CheckpointError:
        return "damaged"
    return "whole"


def _verifies(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True
