"""YAML files in, config values out. It stands above `RunConfig`, which is what a run file says."""

from collections.abc import Sequence
from pathlib import Path
from typing import overload

from pydantic import BaseModel

from megahybrid.config.parsing import Value, parse
from megahybrid.config.run import RunConfig
from megahybrid.config.yaml_file import apply_overrides, read_tree


@overload
def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig: ...
@overload
def load(path: str | Path, overrides: Sequence[str] = (), *, type: type[Value]) -> Value: ...
def load(
    path: str | Path, overrides: Sequence[str] = (), *, type: type[BaseModel] | None = None
) -> BaseModel:
    """The value a YAML file says: its includes in order, the file itself, then `key.sub=value`.

    `type` is the class to read, RunConfig when left out. Raises ConfigError, one line per mistake.
    """
    return parse(type or RunConfig, apply_overrides(read_tree(Path(path)), overrides))
