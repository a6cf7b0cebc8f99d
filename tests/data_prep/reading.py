"""Inputs as a test names them."""

from pathlib import Path

from megahybrid.data_prep.inputs import InputFile
from megahybrid.data_prep.survey import survey


def files_of(*inputs: Path | str, pattern: str = "**/*") -> list[InputFile]:
    """Return the files that a command would read of these inputs."""
    return survey(inputs, pattern).files
