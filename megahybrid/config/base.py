"""The base of every config value, and its way out as plain values and YAML: `dump`, `dump_yaml`.

Values are frozen and complete. Types are strict: text is never read as a number and a boolean is
never an integer. A validator that refuses writes its message as it would follow the dotted path of
its own value: "theta=1 is ..." inside a Rope becomes "model....position.theta=1 is ...".
"""

import difflib
import io
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

# Names of stages, schemes and sources are parts of dotted paths and of file names.
NAME = r"^[A-Za-z0-9_-]{1,100}$"
LONGEST_NAME, MOST_CANDIDATES = 100, 200
Name = Annotated[str, StringConstraints(pattern=NAME)]

# What ends up in a line of its own must not end that line.
LINE = r"^[^\n\r\x00]+$"
JOB_NAME = r"^[^\n\r\x00]{1,200}$"
TIME_LIMIT = r"^(\d{1,4}-)?\d{1,7}(:\d{2}){0,2}$"
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


def dump(value: BaseModel) -> dict[str, Any]:
    """Plain dicts, lists and scalars, every default written out; `parse` reads it back."""
    return cast(dict[str, Any], _without_tuples(value.model_dump(mode="python")))


def dump_yaml(value: BaseModel, *, defaults: bool = True) -> str:
    """The YAML text of a value, every default written out, or only what differs from its default;
    `load` reads either back."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 100
    text = io.StringIO()
    plain = value.model_dump(mode="python", exclude_defaults=not defaults)
    yaml.dump(_without_tuples(plain), text)
    return text.getvalue()


def _without_tuples(plain: Any) -> Any:
    if isinstance(plain, dict):
        return {key: _without_tuples(item) for key, item in plain.items()}
    if isinstance(plain, list | tuple):
        return [_without_tuples(item) for item in plain]
    return plain
