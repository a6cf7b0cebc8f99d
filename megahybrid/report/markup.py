"""Parts as HTML: tables that sort, charts with captions, notes about what is missing."""

import hashlib
from typing import Any, assert_never

from markupsafe import Markup

from megahybrid.report.parts import (
    Chart,
    Heading,
    Listing,
    Missing,
    Note,
    Part,
    Section,
    Strip,
    Table,
)
from megahybrid.report.rendering import Verbatim, identifier, in_figure, render

LONG_TABLE = 12  # rows; longer ones are folded
WIDE_FROM = 380  # pixels: charts at least so high take the whole width
NUMBERED = 48  # layers; with more the cells of a strip are too narrow for numbers


def section_html(section: Section, figures: dict[str, Any]) -> Markup:
    """A section; the figures of its charts are added to `figures` by id."""
    parts = Markup("").join(
        part_html(part, f"{section.id}-{number}", figures)
        for number, part in enumerate(section.parts)
    )
    return render(
        "section.html", id=section.id, title=section.title, lead=section.lead, parts=parts
    )


def part_html(part: Part, place: str, figures: dict[str, Any]) -> Markup:
    """Put a part in a box whose id stays the same while a live page changes."""
    shape = "wide"
    match part:
        case Chart():
            place, inside = identifier(part.id), _chart(part)
            shape = "wide" if part.figure["layout"]["height"] >= WIDE_FROM else "half"
            figures[place] = in_figure(part.figure)
        case Table():
            inside = _folded(part) if len(part.rows) > LONG_TABLE else table_html(part)
        case Missing():
            why = part.why[:1].upper() + part.why[1:]
            inside, shape = render("missing.html", missing=part, why=why), "half"
        case Heading():
            inside = render("heading.html", text=part.text)
        case Note():
            inside = render("note.html", text=part.text)
        case Listing():
            text = Verbatim(part.text)
            inside = render("listing.html", title=part.title, text=text, folded=part.folded)
        case Strip():
            spoken = ", ".join(f"{n} {layer.kind}" for n, layer in enumerate(part.layers))
            numbered = len(part.layers) <= NUMBERED
            inside = render("strip.html", strip=part, spoken=spoken, numbered=numbered)
        case _:
            assert_never(part)
    return boxed(inside, place, shape)


def boxed(inside: Markup, place: str, shape: str = "wide") -> Markup:
    """A part's box; a live page replaces it when its digest has changed."""
    digest = hashlib.sha256(inside.encode()).hexdigest()[:12]
    return render("part.html", inside=inside, place=place, shape=shape, digest=digest)


def _chart(chart: Chart) -> Markup:
    numbers = Markup("")
    if chart.table is not None and chart.table.rows:
        table = table_html(chart.table, label=chart.title)
        numbers = render("folded.html", title="The numbers", inside=table)
    return render(
        "chart.html", chart=chart, spoken=f"{chart.title}. {chart.says}", numbers=numbers,
        height=chart.figure["layout"]["height"],
    )  # fmt: skip


def _folded(table: Table) -> Markup:
    name = table.caption or "The numbers"
    inside = table_html(Table(table.head, table.rows), label=name)
    return render("folded.html", title=f"{name} ({len(table.rows)} rows)", inside=inside)


def table_html(table: Table, label: str = "") -> Markup:
    """A table whose column heads are buttons that sort it. A column `run` that says the same in
    every row is left out."""
    columns = [
        {
            "place": place,
            "name": name,
            "numeric": all(isinstance(row[place], int | float | None) for row in table.rows),
        }
        for place, name in enumerate(table.head)
        if name != "run" or len({row[place] for row in table.rows}) > 1
    ]
    name = table.caption or label or "table"
    return render("table.html", caption=table.caption, label=name, columns=columns, rows=table.rows)
