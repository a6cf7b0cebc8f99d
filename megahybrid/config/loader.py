"""YAML files in, config values out. It stands above `RunConfig`, which is what a run file says."""

from collections.abc import Sequence
from pathlib import Path
from typing import overload

from pydantic import BaseModel

from megahybrid.config.files import beside
from megahybrid.config.old_words import Tell, tell_once
from megahybrid.config.parsing import Value, parse
from megahybrid.config.run import RunConfig
from megahybrid.config.yaml_file import apply_overrides, read_tree


@overload
def load(
    path: str | Path, overrides: Sequence[str] = (), *, tell: Tell = tell_once
) -> RunConfig: ...
@overload
def load(
    path: str | Path, overrides: Sequence[str] = (), *, type: type[Value], tell: Tell = tell_once
) -> Value: ...
def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    type: type[BaseModel] | None = None,
    tell: Tell = tell_once,
) -> BaseModel:
    """Return the value that a YAML file says: its includes in order, the file itself, then
    `key.sub=value`.

    `type` is the class to read, RunConfig when left out. `tell` is given a line about each old word
    that is used, and about data that lie beside the file; it is written to stderr unless said
    otherwise. Raises ConfigError, one line per mistake.
    """
    tree = apply_overrides(read_tree(Path(path), tell), overrides, tell)
    value = parse(type or RunConfig, tree)
    return beside(value, Path(path), tell) if isinstance(value, RunConfig) else value
