"""`megahybrid compare`: two run files or runs, field by field, and which one branched off which."""

from dataclasses import dataclass
from pathlib import Path

from megahybrid.config import RunConfig, load
from megahybrid.config.compare import compare, render_comparison
from megahybrid.config.old_words import silent
from megahybrid.errors import EXIT_DONE, ConfigError, MegahybridError
from megahybrid.ledger import LEDGER_NAME, Parent, RunFacts, read_ledger
from megahybrid.printable import printable


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
            print(printable(_in_words(side, other, parent)))
    rows = compare(sides[0].run, sides[1].run)
    told = render_comparison(rows, sides[0].name, sides[1].name)
    print(printable(told, lines=True), end="")
    return EXIT_DONE


def _side(path: Path) -> _Side:
    if not path.is_dir():
        run = load(path)
        return _Side(str(path), run, run.run_directory(path))
    if not (path / "config.yaml").exists():
        raise ConfigError(
            f"{path} is a folder without a run's config.yaml. Name a run file or a run's folder."
        )
    return _Side(str(path), load(path / "config.yaml", tell=silent), path)


def parent_of(directory: Path) -> Parent | None:
    """Return the checkpoint that a run branched off, as its last start or resume told; None for a
    run that began from nothing, or has not begun."""
    path = directory / LEDGER_NAME
    if not path.exists():
        return None
    try:
        ledger = read_ledger(path)
    except RecursionError:
        raise MegahybridError(f"{path} is damaged (endless lists). Restore the file.") from None
    told = ledger.of(RunFacts)
    if not told:
        return None
    _, newest = max(told, key=lambda found: found[0].attempt)
    try:
        return newest.branched_from()
    except ValueError as error:
        raise MegahybridError(f"{path} is damaged ({error}). Restore the file.") from None


_TAKEN = {
    "weights": "weights alone",
    "state": "weights and moments",
    "all": "weights, moments and data order",
}


def _named_parent(run: RunConfig) -> Parent | None:
    """Return the parent that a run which has not begun names in its file."""
    if run.start is None:
        return None
    return Parent(checkpoint=run.start.checkpoint, take=run.start.take)


def _within(checkpoint: str, directory: Path) -> bool:
    """Return whether a checkpoint is one of the run in `directory`."""
    try:
        place = Path(checkpoint).resolve()
    except (OSError, ValueError, RuntimeError):  # no path at all: a NUL, a name too long, a circle
        return False
    return directory.resolve() in (place, *place.parents)


def _in_words(side: _Side, other: _Side, parent: Parent) -> str:
    where = parent.checkpoint
    if _within(where, other.directory):
        where = f"{other.name} ({where})"
    taken = _TAKEN.get(parent.take, parent.take)
    since = ""
    if parent.step is not None and parent.tokens is not None:
        since = f"step {parent.step:,}, {parent.tokens:,} tokens; "
    return f"{side.name} is a branch of {where}: {since}{taken}"
