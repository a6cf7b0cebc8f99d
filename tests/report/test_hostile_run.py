"""Whatever the files of a run hold, its page shows it as text."""

import json
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megahybrid.report import write_page, write_report
from megahybrid.report.page import content, read_runs
from tests.report.browser import show
from tests.report.hostile_run import ATTACKS, LONG, write_hostile_run
from tests.report.synthetic_run import write_run

# What the page is made of. Nothing else may come out of a file.
ELEMENTS = set(
    re.findall(
        r"\w+",
        "html head meta title link style body a nav div span button noscript p main footer script "
        "header h1 h2 h3 b dl dt dd small section ol ul li details summary pre table thead tbody "
        "tr th td figure figcaption code",
    )
)
ATTRIBUTES = set(
    re.findall(
        r"[\w-]+",
        "lang charset http-equiv content name rel href class id role type aria-label hidden title "
        "aria-labelledby data-live data-is data-figure data-value style tabindex scope",
    )
)


class Shape(HTMLParser):
    """Which elements and attributes a browser would see, and the text of some."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.links: set[str] = set()
        self.scripts: list[str] = []
        self.text = ""
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attributes}
        self.links |= {value or "" for name, value in attributes if name in ("href", "src")}
        self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        else:
            self.text += data


def shape_of(page: Path) -> Shape:
    shape = Shape()
    shape.feed(page.read_text(encoding="utf-8"))
    shape.close()
    return shape


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many scripts the page of an ordinary run has."""
    run = write_run(tmp_path_factory.mktemp("plain") / "run")
    return len(shape_of(write_page([run])).scripts)


@pytest.mark.parametrize("name", ATTACKS)
def test_no_text_of_a_file_becomes_part_of_the_page(tmp_path: Path, name: str, plain: int) -> None:
    run = write_hostile_run(tmp_path / folder_name(ATTACKS[name]), ATTACKS[name])
    page = write_page([run])
    shape = shape_of(page)
    assert shape.elements <= ELEMENTS and shape.attributes <= ATTRIBUTES
    assert all(link.startswith(("#", "data:")) for link in shape.links)
    assert len(shape.scripts) == plain == 4
    json.loads(shape.scripts[0])
    assert not set(shape.text) & set(map(chr, (*range(9), *range(11, 32), *range(127, 160))))
    assert not set(shape.text) & set("\u202e\u2066\u200f\ud800")
    if name in ("element", "script", "svg", "link"):
        assert shape.text.count(ATTACKS[name]) > 20  # shown, not left out


@pytest.mark.parametrize("name", ["formula", "controls", "closing"])
def test_pictures_are_drawn_inside_their_folder_whatever_names_say(
    tmp_path: Path, name: str
) -> None:
    run = write_hostile_run(tmp_path / "run", f"../../{ATTACKS[name]}")
    outside = set(tmp_path.rglob("*"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from|constrained_layout not applied")
        written = write_report(run)
    assert len(written) > 8 and {path.parent for path in written} == {run / "report"}
    assert set(tmp_path.rglob("*")) - outside == {run / "report", *written}


def folder_name(attack: str) -> str:
    return attack.replace("/", "∕").replace("\0", "").encode("utf-8", "ignore")[:200].decode() + "r"


def test_figures_are_plain_text_to_plotly_too(tmp_path: Path) -> None:
    figures = content(read_runs([write_hostile_run(tmp_path / "run", ATTACKS["plotly"])]))[1]
    written = json.dumps(figures)
    assert "&lt;b&gt;bold" in written and "<b>" not in written and "<a " not in written


def test_a_megabyte_in_every_name_is_cut(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    ledger = run / "ledger.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    for line in lines[-3:]:
        line["stage"] = LONG
        line.setdefault("detail", {})["outcome"] = LONG
    warning = {"kind": "event", "event": "warning", "step": 196, "tokens": 1, "stage": LONG}
    lines.append({**warning, "detail": {LONG: LONG, "set": LONG}, "attempt": 1, "time_unix": 1.7e9})
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "samples.txt").write_text(LONG)
    page = write_report(run)[0]
    assert page.stat().st_size < 4_000_000
    assert f"({len(LONG):,} characters)" in page.read_text()


@pytest.mark.parametrize("name", ["element", "attribute", "plotly"])
def test_in_a_browser_nothing_of_it_runs(browser: Any, tmp_path: Path, name: str) -> None:
    run = write_hostile_run(tmp_path / folder_name(ATTACKS[name]), ATTACKS[name])
    show(browser, write_page([run]).as_uri())
    assert browser.get_log("browser") == []
    browser.execute_script(
        "for (const one of document.querySelectorAll('main *'))"
        " for (const kind of ['mouseover', 'focus', 'click', 'load', 'error'])"
        "  one.dispatchEvent(new Event(kind, {bubbles: false}));"
    )
    assert browser.execute_script("return window.pwned") is None
    foreign = "main a, main img, main iframe, main script, main svg a"
    assert browser.execute_script(f"return document.querySelectorAll('{foreign}').length") == 0
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('.plot')]"
        ".every(box => box.querySelector('.main-svg'))"
    )
    assert drawn
    if name == "plotly":
        legend = "return document.querySelector('[data-figure=data-sources] .legend').textContent"
        axis = "return document.querySelector('[data-figure=data-sources] .ytick').textContent"
        shown = browser.execute_script(legend) + browser.execute_script(axis)
        assert "<b>bold</b>" in shown
