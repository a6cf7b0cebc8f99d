"""Checks of a JSON value of a file that should have a certain shape.

Readers of results say the shape as a TypedDict and its parts; pydantic, behind this door, compares.
Fields that the shape does not name may be there, so that an older version reads a newer file.
"""

from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, NotRequired

from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # the one that pydantic knows before Python 3.12

from megahybrid.config.base import Count, Positive
from megahybrid.printable import printable

Finite = FiniteFloat
Seconds = Annotated[FiniteFloat, Field(ge=0, le=1e11)]  # as a span, or since 1970
Share = Annotated[FiniteFloat, Field(ge=0, le=1)]
Digits = Annotated[str, Field(pattern=r"^[0-9]{1,15}$")]
AT_LEAST_ONE = Field(min_length=1)  # in Annotated[list[…], AT_LEAST_ONE]
DEEPEST = 40  # lists and mappings within one another; ours have eight


@cache
def checker(shape: Any) -> Callable[[Any], str | None]:
    """A function that returns what is wrong with a value as `shape`, or None where nothing is."""
    adapter = TypeAdapter(shape)

    def wrong(value: Any) -> str | None:
        try:
            adapter.validate_python(value, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            place = ".".join(map(str, first["loc"])) or "it"
            return printable(f"{place}: {first['msg'].lower()}, not {shown(first['input'])}")
        return None

    return wrong


def shown(value: Any, most: int = 40) -> str:
    """A value in a message: whatever it is, short."""
    match value:
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case int() if abs(value) >= 10**18:
            return "a number too large"
        case _:
            text = repr(value)
            return text if len(text) <= most else f"{text[:most]}…"


def too_deep(value: Any, most: int = DEEPEST) -> bool:
    """Return whether a JSON value has lists and mappings more than `most` deep."""
    layer = [value]
    for _ in range(most):
        layer = [
            inner
            for one in layer
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not layer:
            return False
    return any(isinstance(one, dict | list) for one in layer)


__all__ = [
    "AT_LEAST_ONE",
    "DEEPEST",
    "Count",
    "Digits",
    "Finite",
    "NotRequired",
    "Positive",
    "Seconds",
    "Share",
    "TypedDict",
    "checker",
    "shown",
    "too_deep",
]
