"""Datasets that a command names in place of the held-out sets of its run.

An imported model's run has none: so its loss, its needles' hay and its attention need no run file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megahybrid.config import RunConfig
from megahybrid.config.data import Source
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.run_tokenizer import known_tokenizer
from megahybrid.errors import ConfigError, DataError


def named_sets(given: Sequence[str]) -> dict[str, Path] | None:
    """Return datasets by name from [NAME=]DIR, where DIR's own name is the default; None for none.

    Raises ConfigError for a name without a folder and for one that is given twice.
    """
    sets: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        # A folder may have "=" in its name.
        if not equals or "/" in name or Path(text).exists():
            name, path = Path(text).resolve().name, text
        if not name or not path:
            raise ConfigError(f"--data={text} names no dataset. Write NAME=DIR, or DIR.")
        if name in sets:
            raise ConfigError(
                f"--data={text}: '{name}' is {sets[name]} already. Write another NAME=DIR."
            )
        sets[name] = Path(path)
    return sets or None


def with_held_out(run: RunConfig, sets: Mapping[str, Path] | None) -> RunConfig:
    """Return the run with these held-out sets instead of its own; None: as it is.

    Raises DataError for one that is missing, damaged or made with another tokenizer than the run's
    data.
    """
    if sets is None:
        return run
    for path in sets.values():
        _check_vocabulary(run, path, TokenDataset(path, vocab_size=run.model.vocab_size))
    held_out = {name: Source(path=str(path)) for name, path in sets.items()}
    data = run.data.model_copy(update={"held_out": held_out})
    return run.model_copy(update={"data": data})


def _check_vocabulary(run: RunConfig, data: Path, dataset: TokenDataset) -> None:
    """Raises DataError where --data was made with another tokenizer than the run's data."""
    known = known_tokenizer(run)
    if known is None or dataset.manifest is None:
        return
    trained_on, source = known
    found = dataset.manifest.tokenizer.sha256
    if found != trained_on.sha256:
        raise DataError(
            f"--data={data} was made with the tokenizer {found[:12]}, not the "
            f"{trained_on.sha256[:12]} that the model was trained with ({source}). "
            "Prepare the data with that tokenizer."
        )
