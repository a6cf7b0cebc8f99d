"""The base of every config value, and the way in and out of YAML: `load`, `parse`, `dump`.

Values are frozen and complete. Types are strict: text is never read as a number and a boolean is
never an integer. A validator that refuses writes its message as it would follow the dotted path of
its own value: "theta=1 is ..." inside a Rope becomes "model....position.theta=1 is ...".
"""

import difflib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast, overload

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from megahybrid.config.old_words import Tell, tell_once

if TYPE_CHECKING:
    from megahybrid.config.run import RunConfig

Value = TypeVar("Value", bound=BaseModel)

# Names of stages, schemes and sources are parts of dotted paths and of file names.
NAME = r"^[A-Za-z0-9_-]{1,100}$"
LONGEST_NAME, MOST_CANDIDATES = 100, 200
Name = Annotated[str, StringConstraints(pattern=NAME)]

# A list of numbers in a value that is looked up by its hash, which a list has not.
Numbers = Annotated[
    tuple[float, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
]

# Numbers of files: what is beyond an int64 with room to add is damage, whatever it counts.
Count = Annotated[int, Field(ge=0, le=2**62)]
Positive = Annotated[int, Field(ge=1, le=2**62)]
# Until the year 9999: what a calendar can say.
UnixSeconds = Annotated[float, Field(ge=0, le=253402300799)]
Crc32 = Annotated[int, Field(ge=0, lt=2**32)]


def few(names: Iterable[str], most: int = 10) -> str:
    """The first of many names: "a, b, c and 97 more"."""
    known = list(names)
    more = f" and {len(known) - most:,} more" if len(known) > most else ""
    return ", ".join(known[:most]) + more


class Frozen(BaseModel):
    """A config value: immutable, no unknown fields, no coercion, no infinities."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True
    )


class Record(Frozen):
    """A value that a file of ours holds: checked whole, its parts first, then `faults`."""

    def faults(self) -> Iterator[str]:
        """Yield the faults of fields that are each of their type, as "tokens=5 is ..."."""
        return iter(())

    @model_validator(mode="after")
    def _check(self) -> "Record":
        for fault in self.faults():
            raise ValueError(fault)
        return self


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """ " Did you mean 'x'?" with the nearest candidate, or nothing when none is near."""
    name, known = str(name), [str(c) for c in candidates]
    if len(name) > LONGEST_NAME or len(known) > MOST_CANDIDATES:  # comparing takes their product
        return ""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


@overload
def load(
    path: str | Path, overrides: Sequence[str] = (), *, tell: Tell = tell_once
) -> "RunConfig": ...
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
    """The value a YAML file says: its includes in order, the file itself, then `key.sub=value`.

    `type` is the class to read, RunConfig when left out. `tell` is given a line about each old word
    that is used; it is written to stderr unless said otherwise. Raises ConfigError, one line per
    mistake.
    """
    from megahybrid.config.yaml_file import apply_overrides, read_tree

    if type is None:
        from megahybrid.config.run import RunConfig

        type = RunConfig
    return parse(type, apply_overrides(read_tree(Path(path), tell), overrides, tell))


def parse(type: type[Value], plain: Any, where: str = "") -> Value:
    """The value of class `type` that plain dicts, lists and scalars say.

    `where` is the dotted path of `plain`. Raises ConfigError, one line per mistake.
    """
    from megahybrid.config.explain import explain, too_large
    from megahybrid.errors import ConfigError

    line = too_large(plain, where)
    if line is not None:
        raise ConfigError(line)
    try:
        return type.model_validate(plain)
    except ValidationError as error:
        lines = explain(error, type, plain, where)
    raise ConfigError(*lines)


def parse_json(type: type[Value], text: str | bytes) -> Value:
    """The value that `value.model_dump_json()` wrote: JSON has no integer keys, so they come back
    from text."""
    return type.model_validate_json(text)


def read_record(type: type[Value], raw: bytes) -> Value:
    """The record that JSON says. Raises ConfigError, one line per mistake; ValueError and
    RecursionError for what is no JSON."""
    from megahybrid.config.explain import explain
    from megahybrid.errors import ConfigError

    plain = json.loads(raw)
    try:
        return type.model_validate_json(raw)
    except ValidationError as error:
        lines = explain(error, type, plain)
    raise ConfigError(*lines)


def first_fault(error: ValueError, type: type[BaseModel], plain: Any, where: str = "") -> str:
    """The first thing that `parse_json` found wrong with `plain`, in one line without advice, and
    how many more there are."""
    from megahybrid.config.explain import explain
    from megahybrid.printable import shortened

    if isinstance(error, ValidationError):
        lines = explain(error, type, plain, where)
    else:
        lines = [str(error).splitlines()[0]]
    more = f" (and {len(lines) - 1} more such faults)" if len(lines) > 1 else ""
    # What to do about a value of a run file is nothing to do about a file that we wrote.
    return shortened(lines[0].rsplit(". ", 1)[0], 300).removesuffix(".") + more


def dump(value: BaseModel) -> dict[str, Any]:
    """Plain dicts, lists and scalars, every default written out; `parse` reads it back."""
    return cast(dict[str, Any], _without_tuples(value.model_dump(mode="python")))


def dump_yaml(value: BaseModel) -> str:
    """The YAML text of a value, every default written out; `load` reads it back."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 100
    text = io.StringIO()
    yaml.dump(dump(value), text)
    return text.getvalue()


def _without_tuples(plain: Any) -> Any:
    if isinstance(plain, dict):
        return {key: _without_tuples(item) for key, item in plain.items()}
    if isinstance(plain, list | tuple):
        return [_without_tuples(item) for item in plain]
    return plain
