"""Frozen dataclasses as JSON objects: what is wrong with an object, and the way to and fro.

A field's annotation says once what its value may be (`Count`, `Finite | None`, `tuple[Part, ...]`,
another record). A field without a default must be there. Fields that a record does not name are
passed over, so that an older version reads what a newer one wrote.
"""

import dataclasses
import functools
import operator
import types
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from megahybrid.config.shape import NotRequired, TypedDict, checker

R = TypeVar("R")
Convert = Callable[[Any], Any]
UNIONS = (types.UnionType, Union)  # `X | None` of a class, and of an annotated type


def wrong_fields(record: Any, value: Any, *names: str) -> str | None:
    """Return what is wrong with a JSON value as a record, or with those of its fields that `names`
    name; None where nothing is."""
    return _checker(record, names)(value)


@functools.cache
def _checker(record: Any, names: tuple[str, ...]) -> Callable[[Any], str | None]:
    return checker(_shape(record, names))


def _shape(record: Any, names: tuple[str, ...] = ()) -> Any:
    fields = {
        name: _json_type(hint) if required and not names else NotRequired[_json_type(hint)]
        for name, hint, required in _fields(record)
        if not names or name in names
    }
    return TypedDict(record.__name__, fields)  # type: ignore[operator]


def _json_type(hint: Any) -> Any:
    """The type that a field's value has in JSON: a record is a mapping there, a tuple a list."""
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _shape(hint)
    if origin in UNIONS:
        return functools.reduce(operator.or_, map(_json_type, arguments))
    if origin is tuple:
        return list[_json_type(arguments[0])]  # type: ignore[misc]
    if origin is dict:
        return dict[str, _json_type(arguments[1])]  # type: ignore[misc]
    return hint


def from_json(record: type[R], value: Mapping[str, Any]) -> R:
    """The record of a JSON object with nothing wrong."""
    found = {}
    for name, convert in _converters(cast(Hashable, record)):
        if name in value:
            found[name] = value[name] if convert is None else convert(value[name])
    return record(**found)


@functools.cache
def _converters(record: Any) -> list[tuple[str, Convert | None]]:
    """Return how each field's value is made of JSON; None where it is the same there."""
    return [(name, _converter(hint)) for name, hint, _ in _fields(record)]


def _converter(hint: Any) -> Convert | None:
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return functools.partial(from_json, hint)  # type: ignore[arg-type]
    if origin in UNIONS:
        inner = _converter(next(each for each in arguments if each is not type(None)))
        return inner and functools.partial(_or_none, inner)
    if origin is tuple:
        return functools.partial(_each, _converter(arguments[0]))
    if origin is dict:
        inner = _converter(arguments[1])
        return inner and functools.partial(_each_named, inner)
    return None


def _or_none(convert: Convert, value: Any) -> Any:
    return None if value is None else convert(value)


def _each(convert: Convert | None, values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(values if convert is None else map(convert, values))


def _each_named(convert: Convert, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: convert(value) for name, value in values.items()}


def to_json(value: Any) -> Any:
    """A record as the JSON object that it is written as: its fields in their order, but for those
    that are None where nothing is given."""
    if dataclasses.is_dataclass(value):
        return {
            field.name: to_json(inner)
            for field in dataclasses.fields(value)
            if (inner := getattr(value, field.name)) is not None or field.default is not None
        }
    if isinstance(value, dict):
        return {name: to_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(inner) for inner in value]
    return value


@functools.cache
def _fields(record: Any) -> list[tuple[str, Any, bool]]:
    """Return for each field its name, what it may be, and whether it must be there."""
    hints = get_type_hints(record, include_extras=True)
    nothing = dataclasses.MISSING
    return [
        (each.name, hints[each.name], each.default is nothing and each.default_factory is nothing)
        for each in dataclasses.fields(record)
    ]
