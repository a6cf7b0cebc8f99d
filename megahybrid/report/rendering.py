"""HTML out of templates: every value is escaped, whoever wrote it. The door to Jinja2.

Names of runs, stages, sources and sets, samples and whatever a ledger or a result holds are text
that others may have written. They reach the page through `render` alone, which escapes them, writes
controls as escapes and cuts what is endless; and through `in_figure`, because Plotly reads text as
an HTML of its own.
"""

import hashlib
import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megahybrid.printable import printable

MOST_CHARACTERS = 2_000  # of one text on the page; its raw JSON has the whole
MOST_OF_A_LISTING = 200_000  # characters of what stands on the page as it stands in a file
MOST_OF_A_LABEL = 160  # characters: more than a chart is wide
# Formats that this package wrote and numbers that it formatted, with Plotly's <br> and %{…}.
_OURS = {"hovertemplate", "texttemplate", "customdata"}


class Verbatim(str):
    """Text of many lines, shown as it stands in its file."""


def render(template: str, **values: Any) -> Markup:
    """A template of `templates/` with its values in place."""
    return Markup(_environment().get_template(template).render(**values))


@cache
def _environment() -> Environment:
    from megahybrid.report.parts import number_text

    environment = Environment(
        loader=PackageLoader("megahybrid.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters["number"] = number_text
    environment.filters["identifier"] = identifier
    return environment


def _shown(value: Any) -> Any:
    """Called on whatever a template puts out, before it is escaped."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    most = MOST_OF_A_LISTING if isinstance(value, Verbatim) else MOST_CHARACTERS
    return printable(cut(value, most), lines=True)


def cut(text: str, most: int) -> str:
    """At most `most` characters of a text, and how many it has where that is more."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def identifier(text: str) -> str:
    """A text as an identifier of HTML; texts that differ have identifiers that differ."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", text)[:MOST_OF_A_LABEL]
    return plain if plain == text else f"{plain}-{_digest(text)}"


def in_figure(value: Any, key: str = "") -> Any:
    """A Plotly figure whose texts are shown as they are: it knows <b>, <a href> and others."""
    if isinstance(value, dict):
        return {name: in_figure(one, name) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [in_figure(one, key) for one in value]
    if not isinstance(value, str) or key in _OURS:
        return value
    if len(value) > MOST_OF_A_LABEL:  # labels that differ stay apart
        value = f"{value[:MOST_OF_A_LABEL]}… {_digest(value)}"
    return printable(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
