"""The parts of a page: sections of charts, tables and notes about what was not measured."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Rows that a reader can sort by any column. None is shown as a dash."""

    head: tuple[str, ...]
    rows: list[list[Cell]]
    caption: str = ""


@dataclass(frozen=True)
class Chart:
    """A Plotly figure, what it shows in words, and the same numbers as a table."""

    id: str
    title: str
    says: str  # also read out by a screen reader
    figure: dict[str, Any]
    table: Table | None = None


@dataclass(frozen=True)
class Missing:
    """Something the page would show, had it been measured, and what would measure it."""

    what: str
    why: str
    command: str = ""


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    text: str


@dataclass(frozen=True)
class Note:
    """A sentence of good news."""

    text: str


@dataclass(frozen=True)
class Listing:
    """Text as it stands in a file, its lines kept."""

    title: str
    text: str
    folded: bool = False


@dataclass(frozen=True)
class StripLayer:
    """A layer of a strip, or a kind of layer of its legend."""

    kind: str
    colour: str
    words: str
    count: int = 1


@dataclass(frozen=True)
class Strip:
    """The layers of a model as coloured cells, and the kinds they are of."""

    heading: str
    layers: tuple[StripLayer, ...]
    kinds: tuple[StripLayer, ...]


Part = Chart | Table | Missing | Heading | Note | Listing | Strip


@dataclass(frozen=True)
class Section:
    """A heading, one paragraph for a reader new to the subject, and its parts."""

    id: str
    title: str
    lead: str
    parts: list[Part] = field(default_factory=list)


def rounded(values: Iterable[float | int | None]) -> list[float | int | None]:
    """Six significant digits; what is not finite becomes None, which is a gap in a line."""
    return [_rounded(value) for value in values]


def _rounded(value: float | int | None) -> float | int | None:
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def finite(value: Any) -> Any:
    """A JSON value with None for each number that is not finite, which JSON cannot say."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number_text(value: int | float) -> str:
    """1,234 for whole numbers; four significant digits and no needless zeros for others."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e7):
        return f"{value:.2e}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def listed(names: Sequence[str], most: int = 6) -> str:
    """ "a", "a and b", "a, b and c"; beyond `most` the rest is counted."""
    names = list(names)
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} others"]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def short_number(value: float) -> str:
    """1_500_000 → "1.5M"; 0.25 → "0.25"."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size * 0.9999:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def short_tokens(tokens: float) -> str:
    """4096 → "4k": lengths are powers of two."""
    return f"{tokens / 1024:g}k" if tokens >= 1024 else f"{tokens:g}"
