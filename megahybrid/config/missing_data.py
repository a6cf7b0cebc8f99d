"""Which data of a run are not there, and the command that makes them, as far as it is known."""

import os

from megahybrid.config.base import few
from megahybrid.config.run import RunConfig
from megahybrid.printable import shortened

# The folder that a command of ours fills, and the command.
MADE_BY = (
    ("build/demo/", "megahybrid data demo"),
    ("build/demo_chat/", "megahybrid data demo --chats"),
)


def missing_data(run: RunConfig) -> list[tuple[str, str]]:
    """Return field and path of every dataset and tokenizer that is not where the run names it."""
    named = [(f"{field}.path", path) for field, path in run.data.datasets()]
    if run.data.tokenizer is not None:
        named.append(("data.tokenizer", run.data.tokenizer))
    return [(field, path) for field, path in named if not dataset_exists(path)]


def making_command(path: str) -> str | None:
    """Return the command that makes the data at `path`, or None where no command of ours does."""
    inside = os.path.normpath(path) + "/"
    return next((command for folder, command in MADE_BY if inside.startswith(folder)), None)


def missing_in_words(run: RunConfig) -> str | None:
    """Return one line that names the missing data and how to make them; None where all is there."""
    missing = missing_data(run)
    if not missing:
        return None
    paths = list(dict.fromkeys(shortened(path, 100) for _, path in missing))
    commands = {making_command(path) for _, path in missing}
    named = [command for command in commands if command is not None]
    way_out = f"Make {'it' if len(paths) == 1 else 'them'} with: {', '.join(named)}"
    if None in commands:
        way_out = "Prepare the data with `megahybrid data tokenize`, or correct the path."
    return f"data not here: {few(paths)}. {way_out}"


def dataset_exists(path: str) -> bool:
    """Return whether a dataset's folder, file or prefix (of a .bin and an .idx) is there."""
    return os.path.exists(path) or os.path.exists(f"{path}.idx")
