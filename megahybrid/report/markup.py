"""Parts as HTML: tables that sort, charts with captions, notes about what is missing."""

import hashlib
from html import escape
from typing import Any

from megahybrid.report.parts import Cell, Chart, Html, Missing, Part, Section, Table

LONG_TABLE = 12  # rows; longer ones are folded
WIDE_FROM = 380  # pixels: charts at least so high take the whole width


def section_html(section: Section, figures: dict[str, Any]) -> str:
    """A section; the figures of its charts are added to `figures` by id."""
    parts = "".join(
        part_html(part, f"{section.id}-{number}", figures)
        for number, part in enumerate(section.parts)
    )
    return (
        f'<section id="{section.id}" aria-labelledby="{section.id}-title">'
        f'<h2 id="{section.id}-title">{escape(section.title)}</h2>'
        f'<p class="lead">{escape(section.lead)}</p><div class="parts">{parts}</div></section>'
    )


def part_html(part: Part, place: str, figures: dict[str, Any]) -> str:
    """One part, in a box whose id stays the same while a live page changes."""
    wide = True
    if isinstance(part, Chart):
        place, inner, wide = part.id, _chart(part), part.figure["layout"]["height"] >= WIDE_FROM
        figures[part.id] = part.figure
    elif isinstance(part, Table):
        inner = _folded(part) if len(part.rows) > LONG_TABLE else table_html(part)
    elif isinstance(part, Missing):
        inner, wide = _missing(part), False
    else:
        assert isinstance(part, Html)
        inner = part.text
    shape = "wide" if wide else "half"
    digest = hashlib.sha256(inner.encode()).hexdigest()[:12]
    return f'<div class="part {shape}" id="part-{escape(place)}" data-is="{digest}">{inner}</div>'


def _chart(chart: Chart) -> str:
    spoken = f"{chart.title}. {chart.says}"
    below = ""
    if chart.table is not None and chart.table.rows:
        below = (
            "<details><summary>The numbers</summary>"
            f"{table_html(chart.table, label=chart.title)}</details>"
        )
    height = chart.figure["layout"]["height"]
    return (
        f'<figure><h3 class="name">{escape(chart.title)}</h3>'
        f'<div class="plot" role="img" aria-label="{escape(spoken)}" '
        f'data-figure="{escape(chart.id)}" style="min-height:{height}px"></div>'
        f'<figcaption class="says">{escape(chart.says)}</figcaption>'
        f'<div class="numbers">{below}</div></figure>'
    )


def _folded(table: Table) -> str:
    name = table.caption or "The numbers"
    return (
        f"<details><summary>{escape(name)} ({len(table.rows)} rows)</summary>"
        f"{table_html(Table(table.head, table.rows), label=name)}</details>"
    )


def table_html(table: Table, label: str = "") -> str:
    """A table whose column heads are buttons that sort it. A column `run` that says the same in
    every row is left out."""
    keep = [
        place
        for place, name in enumerate(table.head)
        if name != "run" or len({row[place] for row in table.rows}) > 1
    ]
    numeric = [
        all(isinstance(row[place], int | float | None) for row in table.rows)
        for place in range(len(table.head))
    ]
    heads = "".join(
        f'<th scope="col"{" class=n" if numeric[place] else ""}>'
        f'<button type="button">{escape(table.head[place])}</button></th>'
        for place in keep
    )
    body = "".join(
        "<tr>" + "".join(_cell(row[place], numeric[place]) for place in keep) + "</tr>"
        for row in table.rows
    )
    # Outside the table: a caption would scroll away with it on a phone.
    caption = f'<p class="caption">{escape(table.caption)}</p>' if table.caption else ""
    name = escape(table.caption or label or "table")
    return (
        f'{caption}<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(value: Cell, numeric: bool) -> str:
    if value is None:
        return '<td class="n none">–</td>'
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    return f'<td{" class=n" if numeric else ""} data-value="{value!r}">{number_text(value)}</td>'


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


def _missing(missing: Missing) -> str:
    command = f"<code>{escape(missing.command)}</code>" if missing.command else ""
    return (
        f'<div class="missing"><p><b>Not measured:</b> {escape(missing.what)}. '
        f"{escape(missing.why[:1].upper() + missing.why[1:])}.</p>{command}</div>"
    )
