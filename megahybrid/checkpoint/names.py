"""The names in `RUN/checkpoints`, what each means, and whether a folder bears its own.

`step-00001234` is published. `.step-00001234.tmp` is being written or deleted, and is nobody's.
`.step-00001234.replaced` is a published one that a save of the same step has just put aside: it
still counts while no `step-00001234` stands in its place.
"""

import os
import re
from pathlib import Path

FOLDER = "checkpoints"
PUBLISHED = re.compile(r"(\.?)step-(\d{8,})(\.replaced)?")
TEMPORARY = re.compile(r"\.step-\d{8,}\.tmp")


def checkpoints_of(run_directory: Path) -> Path:
    """The folder that holds a run's checkpoints."""
    return Path(run_directory) / FOLDER


def published_path(run_directory: Path, step: int) -> Path:
    """Return the path of a step's checkpoint when it is complete."""
    return checkpoints_of(run_directory) / f"step-{step:08d}"


def temporary_path(run_directory: Path, step: int) -> Path:
    """Return the path where a step's checkpoint is written."""
    return checkpoints_of(run_directory) / f".step-{step:08d}.tmp"


def replaced_path(run_directory: Path, step: int) -> Path:
    """Return the path where a checkpoint waits while another of the same step takes its place."""
    return checkpoints_of(run_directory) / f".step-{step:08d}.replaced"


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    match = PUBLISHED.fullmatch(path.name)
    assert match is not None, path
    return int(match[2])


def name_fault(folder: Path, step: int) -> str | None:
    """Return why a folder that holds `step` cannot stand where it does, or None.

    In a run's `checkpoints` a name decides which one is newest: a copy or a folder that was renamed
    there would hide the real ones from every restart, and retention would delete them. Elsewhere a
    checkpoint may have any name.
    """
    parent, name = os.path.split(os.path.abspath(folder))
    match = PUBLISHED.fullmatch(name)
    if os.path.basename(parent) != FOLDER or match is None:
        return None
    right = f"step-{step:08d}"
    if name in (right, f".{right}.replaced"):
        return None
    return (
        f"it holds step {step}, not the step {int(match[2])} that it is named after. "
        f"Rename it to {right}, or move it out of {FOLDER}"
    )
