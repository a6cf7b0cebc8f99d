"""Plain values and JSON in, config values out; what is wrong with them is told in our own words."""

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from megahybrid.config.explain import explain, too_large
from megahybrid.errors import ConfigError
from megahybrid.printable import shortened

Value = TypeVar("Value", bound=BaseModel)


def parse(type: type[Value], plain: Any, where: str = "") -> Value:
    """The value of class `type` that plain dicts, lists and scalars say.

    `where` is the dotted path of `plain`. Raises ConfigError, one line per mistake.
    """
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
    plain = json.loads(raw)
    try:
        return type.model_validate_json(raw)
    except ValidationError as error:
        lines = explain(error, type, plain)
    raise ConfigError(*lines)


def first_fault(error: ValueError, type: type[BaseModel], plain: Any, where: str = "") -> str:
    """The first thing that `parse_json` found wrong with `plain`, in one line without advice, and
    how many more there are."""
    if isinstance(error, ValidationError):
        lines = explain(error, type, plain, where)
    else:
        lines = [str(error).splitlines()[0]]
    more = f" (and {len(lines) - 1} more such faults)" if len(lines) > 1 else ""
    # What to do about a value of a run file is nothing to do about a file that we wrote.
    return shortened(lines[0].rsplit(". ", 1)[0], 300).removesuffix(".") + more
