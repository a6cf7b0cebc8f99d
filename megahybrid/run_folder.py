"""The folders that a command may fill with its files: new, empty, or made by the same command."""

import os
from collections.abc import Iterable
from pathlib import Path

from megahybrid.errors import ConfigError, PathError
from megahybrid.printable import shortened

# What makes a folder a run's whatever else lies there: somebody's training must not be locked out
# of its own place.
_PROOFS = ("ledger.jsonl", "checkpoints")
# What a run, its jobs and its reports write. A job's launcher writes before the run does.
_OF_A_RUN = frozenset(
    (
        *_PROOFS, "config.yaml", "model_fingerprint", "logs", "heartbeats", "slurm", "stop-now",
        "save-now", "samples.txt", "evaluations", "report", "profile", "programs", "tensorboard",
        "wandb", "lost+found",
    )
)  # fmt: skip
# What people lay beside a run before it begins: its file, notes, a script and what that said.
_NOTES = (".yaml", ".yml", ".md", ".txt", ".sh", ".out", ".err", ".log")
# What another thing is told by.
_OTHERS = {
    "study.yaml": "a study", "study.lock": "a study's output", "config.json": "a model",
    "manifest.json": "a dataset or a checkpoint",
}  # fmt: skip


def refuse_foreign_run_folder(directory: Path, option: str = "directory") -> None:
    """Raise ConfigError where `directory` holds something that is no run.

    That is a dataset, a checkpoint, a model, a study, or anybody's files. Ranks of one launch look
    at different times, so what one of them writes allows nothing.
    """
    names = _entries(directory, option)
    if not any(proof in names for proof in _PROOFS):
        _refuse(directory, option, names, _OF_A_RUN, _NOTES, "a run's")


def holds_run(directory: Path) -> bool:
    """Return whether a run, or a job that is to start one, has been in `directory`."""
    return any((directory / name).exists() for name in (*_PROOFS, "slurm", "heartbeats", "logs"))


def refuse_foreign_study_folder(out: Path, option: str = "--out") -> None:
    """Raise ConfigError where `out` holds something that is no study's output."""
    names = _entries(out, option)
    own = ("study.lock", "results", "runs", "logs", "data", "table.json", "commands")
    if "study.lock" not in names and "results" not in names:
        _refuse(out, option, names, own, (".svg", ".png"), "a study's output")


def _refuse(
    directory: Path,
    option: str,
    names: Iterable[str],
    own: Iterable[str],
    notes: tuple[str, ...],
    whose: str,
) -> None:
    strange = [name for name in names if name in _OTHERS]
    strange += [
        name
        for name in names
        if name not in own and not name.startswith(".") and not name.endswith(notes)
    ]
    if strange:
        what = _OTHERS.get(strange[0])
        held = f"{what} ({strange[0]})" if what else shortened(strange[0])
        raise ConfigError(
            f"{option}={shortened(str(directory), 200)} holds {held}, which is not {whose}. "
            f"Name a new or empty folder, or {whose}."
        )


def _entries(directory: Path, option: str) -> list[str]:
    """Return the names in a folder, sorted.

    None where it does not exist or is no folder: making it will then say so.
    """
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise PathError(
            f"{option}={shortened(str(directory), 200)} cannot be read ({error.strerror}). "
            "Name another folder."
        ) from None
