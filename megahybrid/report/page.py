"""One self-contained HTML page about one run or several: it needs no network and no other file."""

import base64
import gzip
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from megahybrid.config import dump
from megahybrid.errors import ConfigError, MegahybridError
from megahybrid.report.kept import Kept, every
from megahybrid.report.markup import section_html, table_html
from megahybrid.report.parts import Missing, Section, finite, listed
from megahybrid.report.record import RunRecord, read_record
from megahybrid.report.sections import not_measured, sections
from megahybrid.report.summary import comparison, key_figures, sentences

MOST_STEPS = 20_000  # of each run in the page's data; the ledger has them all


def read_runs(directories: Sequence[Path]) -> list[RunRecord]:
    """The runs' records, labelled apart. Raises MegahybridError for a folder that holds none."""
    resolved = [directory.resolve() for directory in directories]
    if len(set(resolved)) < len(resolved):
        double = next(path for path in resolved if resolved.count(path) > 1)
        raise ConfigError(f"RUN={double} is named twice. Name each run once.")
    names = [path.name for path in resolved]
    return [
        read_record(
            given, None if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}"
        )
        for given, path in zip(directories, resolved, strict=True)
    ]


def content(records: Sequence[RunRecord]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The page's `<main>`, its figures by id, and the numbers behind it."""
    everything = [every(record.directory) for record in records]
    newest = [list({(one.kind, one.name): one for one in kept}.values()) for kept in everything]
    parts = sections(records, newest, everything)
    figures: dict[str, Any] = {}
    body = "".join(section_html(section, figures) for section in parts)
    main = _head(records, newest) + body + _missing(parts)
    data = {"runs": [_numbers(r, kept) for r, kept in zip(records, newest, strict=True)]}
    return main, finite(figures), finite(data)


def page(records: Sequence[RunRecord], live: str = "") -> str:
    """The page as HTML text. `live` is where a served page asks for changes."""
    main, figures, data = content(records)
    folder = files("megahybrid.report")
    template = Template(folder.joinpath("page.html").read_text("utf-8"))
    return template.substitute(
        title=escape(listed([record.name for record in records])),
        style=folder.joinpath("page.css").read_text("utf-8"),
        script=folder.joinpath("page.js").read_text("utf-8"),
        nav=_nav(),
        main=main,
        figures=script_json(figures),
        data=packed(json.dumps(data, allow_nan=False).encode()),
        library=_library(),
        live=escape(live),
    )


def script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def packed(content: bytes) -> str:
    """gzip in base64: a quarter of the page."""
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode("ascii")


@cache
def _library() -> str:
    """Plotly's own bundle, as its Python package ships it."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MegahybridError(
            f"the page's charts need the package plotly ({error}). "
            "Run `pip install 'plotly>=6,<8'`."
        ) from None
    return packed(get_plotlyjs().encode())


_SECTIONS = (
    ("model", "Model"), ("training", "Training"), ("position", "Distance"),
    ("retrieval", "Retrieval"), ("attention", "Attention"), ("data", "Data"),
    ("faults", "Faults"), ("environment", "Environment"), ("missing", "Not measured"),
)  # fmt: skip


def _nav() -> str:
    return "".join(f'<a href="#{name}">{title}</a>' for name, title in _SECTIONS)


def _head(records: Sequence[RunRecord], kept: Sequence[Sequence[Kept]]) -> str:
    names = [record.name for record in records]
    title = names[0] if len(names) == 1 else f"{len(names)} runs side by side"
    blocks = []
    for record, mine in zip(records, kept, strict=True):
        told = "".join(f"<p>{one}</p>" for one in sentences(record, mine))
        tiles = "".join(
            f"<div><dt>{escape(figure.what)}</dt><dd>{escape(figure.value)}"
            f"<small>{escape(figure.note)}</small></dd></div>"
            for figure in key_figures(record, mine)
        )
        blocks.append(f'<div class="about"><div class="told">{told}</div><dl>{tiles}</dl></div>')
    side = table_html(comparison(records, kept)) if len(records) > 1 else ""
    return (
        f'<header id="top"><p class="eyebrow">megahybrid run report</p><h1>{escape(title)}</h1>'
        f"{side}{''.join(blocks)}</header>"
    )


def _missing(parts: Sequence[Section]) -> str:
    found: list[Missing] = not_measured(parts)
    lead = "What this page could show and does not, and the command that would measure it."
    if not found:
        items = "<p>Everything this page can show was measured.</p>"
    else:
        items = "<ul class=todo>" + "".join(
            f"<li><b>{escape(one.what)}</b>: {escape(one.why)}."
            + (f"<code>{escape(one.command)}</code>" if one.command else "")
            + "</li>"
            for one in found
        ) + "</ul>"  # fmt: skip
    return (
        '<section id="missing" aria-labelledby="missing-title"><h2 id="missing-title">Not '
        f'measured</h2><p class="lead">{lead}</p><div class="parts"><div class="part wide" '
        f'id="part-missing">{items}</div></div></section>'
    )


def _numbers(record: RunRecord, kept: Sequence[Kept]) -> dict[str, Any]:
    """What the page was drawn from, for whoever wants to draw it otherwise."""
    steps = record.steps
    every_nth = max(1, -(-len(steps) // MOST_STEPS))
    return {
        "name": record.name,
        "directory": str(record.directory),
        "config": dump(record.config) if record.config else None,
        "steps_every": every_nth,
        "steps": [asdict(line) for line in steps[::every_nth]],
        "events": [asdict(line) for line in record.ledger.events],
        "results": [asdict(one) for one in kept],
    }
