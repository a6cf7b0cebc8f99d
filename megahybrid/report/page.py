"""One self-contained HTML page about one run or several: it needs no network and no other file."""

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from megahybrid.config import dump
from megahybrid.errors import ConfigError, MegahybridError
from megahybrid.report.evaluation_files import EvaluationFile, read_evaluations
from megahybrid.report.markup import boxed, section_html, table_html
from megahybrid.report.parts import Section, finite, listed
from megahybrid.report.record import RunRecord, read_record
from megahybrid.report.rendering import render
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


def content(records: Sequence[RunRecord]) -> tuple[Markup, dict[str, Any], dict[str, Any]]:
    """The page's `<main>`, its figures by id, and the numbers behind it."""
    everything = [read_evaluations(record.directory) for record in records]
    newest = [
        list({(one.kind, one.name): one for one in results}.values()) for results in everything
    ]
    parts = sections(records, newest, everything)
    figures: dict[str, Any] = {}
    body = Markup("").join(section_html(section, figures) for section in parts)
    main = _head(records, newest) + body + _missing(parts)
    data = {"runs": [_numbers(r, results) for r, results in zip(records, newest, strict=True)]}
    return main, finite(figures), finite(data)


def page(records: Sequence[RunRecord], live: str = "") -> str:
    """The page as HTML text. `live` is where a served page asks for changes."""
    main, figures, data = content(records)
    folder = files("megahybrid.report")
    # Ours as they are: a stylesheet, scripts, and base64.
    style, script = (
        Markup(folder.joinpath(name).read_text("utf-8")) for name in ("page.css", "page.js")
    )
    return render(
        "page.html",
        policy=_policy(script, _plotly(), live=live),
        title=listed([record.name for record in records]),
        style=style,
        script=script,
        sections=_SECTIONS,
        main=main,
        figures=figures,
        data=packed(json.dumps(data, allow_nan=False).encode()),
        library=_library(),
        live=live,
    )


def _policy(*scripts: str, live: str) -> str:
    """Return the browser's rules: it runs these very scripts, and asks where the page is live."""
    digests = (base64.b64encode(hashlib.sha256(one.encode()).digest()) for one in scripts)
    allowed = " ".join(f"'sha256-{digest.decode()}'" for digest in digests)
    reach = "'self'" if live else "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        f"img-src data: blob:; connect-src {reach}; base-uri 'none'; form-action 'none'"
    )


def packed(content: bytes) -> Markup:
    """gzip in base64: a quarter of the page."""
    return Markup(base64.b64encode(gzip.compress(content, 9, mtime=0)).decode("ascii"))


@cache
def _library() -> Markup:
    return packed(_plotly().encode())


@cache
def _plotly() -> str:
    """Plotly's own bundle, as its Python package ships it."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MegahybridError(
            f"the page's charts need the package plotly ({error}). "
            "Run `pip install 'plotly>=6,<8'`."
        ) from None
    return get_plotlyjs()


_SECTIONS = (
    ("model", "Model"), ("training", "Training"), ("position", "Distance"),
    ("retrieval", "Retrieval"), ("attention", "Attention"), ("data", "Data"),
    ("faults", "Faults"), ("environment", "Environment"), ("missing", "Not measured"),
)  # fmt: skip


def _head(records: Sequence[RunRecord], results: Sequence[Sequence[EvaluationFile]]) -> Markup:
    names = [record.name for record in records]
    title = names[0] if len(names) == 1 else f"{len(names)} runs side by side"
    abouts = [
        {"sentences": sentences(record, mine), "figures": key_figures(record, mine)}
        for record, mine in zip(records, results, strict=True)
    ]
    side = table_html(comparison(records, results)) if len(records) > 1 else Markup("")
    return render("head.html", title=title, side=side, abouts=abouts)


def _missing(parts: Sequence[Section]) -> Markup:
    return render(
        "section.html",
        id="missing",
        title="Not measured",
        lead="What this page could show and does not, and the command that would measure it.",
        parts=boxed(render("todo.html", missing=not_measured(parts)), "missing"),
    )


def _numbers(record: RunRecord, results: Sequence[EvaluationFile]) -> dict[str, Any]:
    """Return the numbers that the page was drawn from, for whoever wants to draw it otherwise."""
    steps = record.steps
    every_nth = max(1, -(-len(steps) // MOST_STEPS))
    return {
        "name": record.name,
        "directory": str(record.directory),
        "config": dump(record.config) if record.config else None,
        "steps_every": every_nth,
        "steps": [asdict(line) for line in steps[::every_nth]],
        "events": [asdict(line) for line in record.ledger.events],
        "results": [asdict(one) for one in results],
    }
