"""`megahybrid compare`: two run files or runs, field by field, and which one branched off which."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megahybrid.config import RunConfig, load
from megahybrid.config.compare import compare, render_comparison
from megahybrid.errors import EXIT_DONE, ConfigError
from megahybrid.train.ledger import LEDGER_NAME, read_ledger


@dataclass(frozen=True)
class _Side:
    """A run file, or a run's folder with the file it was given."""

    name: str
    run: RunConfig
    directory: Path


def compare_runs(first: Path, second: Path) -> int:
    """Print what differs, after the parent of each that is a branch. Returns the exit code."""
    sides = _side(first), _side(second)
    for side, other in (sides, sides[::-1]):
        parent = parent_of(side.directory) or _named_parent(side.run)
        if parent is not None:
            print(_in_words(side, other, parent))
    rows = compare(sides[0].run, sides[1].run)
    print(render_comparison(rows, sides[0].name, sides[1].name), end="")
    return EXIT_DONE


def _side(path: Path) -> _Side:
    if not path.is_dir():
        run = load(path)
        return _Side(str(path), run, run.run_directory(path))
    if not (path / "config.yaml").exists():
        raise ConfigError(
            f"{path} is a folder without a run's config.yaml. Name a run file or a run's folder."
        )
    return _Side(str(path), load(path / "config.yaml"), path)


def parent_of(directory: Path) -> dict[str, Any] | None:
    """The checkpoint a run branched off, as its last start or resume told: {checkpoint, step,
    tokens, take}; None for a run that began from nothing, or has not begun."""
    path = directory / LEDGER_NAME
    if not path.exists():
        return None
    ledger = read_ledger(path)
    told = [*ledger.named("start"), *ledger.named("resume")]
    return max(told, key=lambda line: line.attempt).detail.get("parent") if told else None


def _named_parent(run: RunConfig) -> dict[str, Any] | None:
    """Of a run that has not begun: what its file names."""
    if run.start is None:
        return None
    return {"checkpoint": run.start.checkpoint, "take": run.start.take}


def _in_words(side: _Side, other: _Side, parent: dict[str, Any]) -> str:
    checkpoint = Path(parent["checkpoint"]).resolve()
    where = str(parent["checkpoint"])
    if other.directory.resolve() in (checkpoint, *checkpoint.parents):
        where = f"{other.name} ({where})"
    taken = "weights alone" if parent["take"] == "weights" else "weights, moments and data order"
    since = f"step {parent['step']:,}, {parent['tokens']:,} tokens; " if "step" in parent else ""
    return f"{side.name} is a branch of {where}: {since}{taken}"
