"""The one page: opened in a real browser, from a file, as a colleague would."""

import json
import re
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from megahybrid.errors import ConfigError
from megahybrid.ledger import PositionBucket
from megahybrid.report import write_page, write_report
from megahybrid.report.figures import thinned
from megahybrid.report.page import content, read_runs
from megahybrid.report.parts import number_text
from megahybrid.report.position_charts import loss_at
from megahybrid.report.record import Evaluation
from tests.report.browser import requests, show, show_still, wait
from tests.report.synthetic_answers import write_answers
from tests.report.synthetic_run import write_run

CHARTS = {
    "loss", "learning-rate", "throughput", "gradient-norm", "seconds", "progress",
    *(f"position-demo-{name}-{n}" for name in ("sample", "longest") for n in range(3)),
    "gain-demo-longest",
    "needle-demo-long-single", "by-length-demo-long-ruler", "by-length-demo-long-puzzles",
    "suite-demo-long", "data-sources", "data-lengths",
    *(f"telemetry-demo-{name}" for name in ("entropy_bits", "distance", "sink", "max_logit")),
    *(f"{name}-demo-needle-needle" for name in ("mass", "entropy", "heads", "keys", "lags")),
    *(f"{name}-demo-needle-needle" for name in ("near", "near-lags")),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    whole = write_answers(write_run(folder / "demo", crash_at=80, sampled=True))
    return [whole, write_run(folder / "plain", mfu=0.4)]


@pytest.fixture(scope="module")
def page(runs: list[Path]) -> Path:
    return write_page(runs[:1])


def test_the_page_is_one_file_without_links_to_elsewhere(page: Path, runs: list[Path]) -> None:
    assert page == runs[0] / "report" / "report.html"
    assert page.stat().st_size < 3_000_000
    html = page.read_text()
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", html)
    assert not re.search(r"https?://", html)


def test_every_figure_is_what_plotly_expects(runs: list[Path]) -> None:
    for several in (runs[:1], runs):
        figures = content(read_runs(several))[1]
        assert figures.keys() >= (CHARTS if several == runs[:1] else {"loss"})
        for figure in figures.values():
            go.Figure(figure)  # raises for a property that plotly does not know


def test_many_analyses_are_a_table_and_charts_of_one_length_and_depth(tmp_path: Path) -> None:
    run = write_answers(write_run(tmp_path / "demo"))
    (path,) = (run / "evaluations").glob("step-00000196.attention.*")
    told = json.loads(path.read_text())
    one = told["results"][0]
    told["trained_length"] = 4096
    told["results"] = [
        one | {"length": length, "depth": depth, "trials": 7}
        for length in (256, 4096, 8192) for depth in (0.1, 0.4, 0.9)
    ]  # fmt: skip
    path.write_text(json.dumps(told))
    html, figures = content(read_runs([run]))[:2]
    assert {name for name in figures if name.startswith("mass")} == {"mass-demo-needle-needle"}
    assert "4,096 tokens, the sentence at 40% depth; 7 examples" in html
    assert html.count("<td>10%–90%</td>") == 6  # three lengths, two kinds of layers
    assert len([path for path in write_report(run) if path.stem.startswith("heads_")]) == 1


def test_results_of_a_broken_model_are_gaps(tmp_path: Path) -> None:
    run = write_answers(write_run(tmp_path / "demo"))
    for path in (run / "evaluations").glob("step-00000196.*"):
        text = re.sub(r'("(?:log_likelihood|entropy_bits|needle|retrieval)": )[\d.-]+', r"\1NaN",
                      path.read_text())  # fmt: skip
        path.write_text(text)
    main, *numbers = content(read_runs([run]))
    json.dumps(numbers, allow_nan=False)
    assert "NaN" not in main
    assert write_report(run)


def test_runs_side_by_side_share_a_chart_of_loss_by_position(runs: list[Path]) -> None:
    figures = content(read_runs(runs))[1]
    assert [line["name"] for line in figures["position-all-sample"]["data"]] == ["demo", "plain"]
    stages = [line["name"] for line in figures["position-plain-sample"]["data"]]
    assert len(stages) == 3 and all(name.startswith("after ") for name in stages)


def test_the_page_says_what_the_run_was_and_how_it_went(page: Path) -> None:
    html = page.read_text()
    for expected in (
        "eight layers: six (local) see the last 64 tokens, with rotary positions",
        "3.21M tokens in three stages",
        "from 256 to 4,096 tokens: 196 steps",
        "It is done, in two attempts",
        "<td>rows of 32,768 (8×)</td>",
        "<td>a sliding window of 4,096</td>",
        '<td>arc</td><td>acc</td><td class=n data-value="0.5">0.5</td><td class=n',
        "<td>loss on sample</td>",
        "return self &amp; size",
        "&lt;size&gt;",
    ):
        assert expected in html


def test_what_was_not_measured_is_said_with_the_command_for_it(runs: list[Path]) -> None:
    main = content(read_runs(runs[1:]))[0]
    for command in (
        f"megahybrid evaluate {runs[1]} configs/suites/needles.yaml",
        f"megahybrid evaluate {runs[1]} configs/suites/ruler.yaml",
        f"megahybrid analyse {runs[1]}",
        "evaluate.attention_every_steps=100",
    ):
        assert main.count(command) == 2  # where it is missing, and in the list at the end


def test_a_browser_draws_every_chart_without_an_error_or_a_request(
    browser: Any, page: Path
) -> None:
    show(browser, page.as_uri())
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map(box => [box.dataset.figure,"
        " box.querySelectorAll('.trace, .heatmaplayer image').length,"
        " box.data.filter(one => one.visible !== false).length])"
    )
    assert {name for name, *_ in drawn} == CHARTS
    for name, marks, traces in drawn:
        assert marks >= traces > 0, name
    assert browser.get_log("browser") == []
    assert requests(browser) == [page.as_uri()]


def test_tables_sort_by_a_click_and_by_the_keyboard(browser: Any, page: Path) -> None:
    show_still(browser, page.as_uri())
    heads = browser.find_elements("css selector", "#training > .parts > .part > .scroll th button")
    steps = next(head for head in heads if head.text.startswith("steps"))

    def column() -> list[str]:
        rows = steps.find_elements("xpath", "ancestor::table/tbody/tr")
        return [row.find_elements("tag name", "td")[3].text for row in rows]

    assert column() == ["122", "49", "25"]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", steps)
    steps.click()
    assert column() == ["25", "49", "122"]  # as numbers: as texts 122 would come first
    assert steps.find_element("xpath", "..").get_attribute("aria-sort") == "ascending"
    steps.send_keys("\ue007")  # Enter
    assert column() == ["122", "49", "25"]


def test_hovering_shows_values_and_the_data_can_be_saved(browser: Any, page: Path) -> None:
    from selenium.webdriver import ActionChains

    show_still(browser, page.as_uri())
    box = browser.find_element("css selector", "[data-figure=loss] .nsewdrag")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", box)
    ActionChains(browser).move_to_element(box).perform()
    words = wait(
        browser, "return document.querySelector('[data-figure=loss] .hoverlayer').textContent"
    )
    assert re.search(r"training : \d\.\d{4}", words), words
    saved = browser.execute_async_script(
        "const done = arguments[0];"
        "const make = URL.createObjectURL.bind(URL);"
        "URL.createObjectURL = blob => { blob.text().then(done); return make(blob); };"
        "document.getElementById('save').click();"
    )
    assert '"steps_every": 1' in saved and '"learning_rate"' in saved


@pytest.mark.parametrize(("width", "dark"), [(1200, True), (390, False)], ids=["dark", "phone"])
def test_the_page_fits_a_phone_and_the_dark(
    browser: Any, page: Path, width: int, dark: bool
) -> None:
    show(browser, page.as_uri(), width, dark)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    paper, ink, axis = browser.execute_script(
        "const of = (element, name) => getComputedStyle(element)[name];"
        "return [of(document.body, 'backgroundColor'), of(document.body, 'color'),"
        " of(document.querySelector('.xtick text'), 'fill')]"
    )
    assert contrast(paper, ink) > 12
    assert contrast(paper, axis) > 4.5
    assert (luminance(paper) < 0.1) == dark


def test_several_runs_stand_side_by_side(browser: Any, runs: list[Path], tmp_path: Path) -> None:
    show(browser, write_page(runs, tmp_path / "both.html").as_uri())
    names = browser.execute_script(
        "return document.querySelector('[data-figure=loss]').data.map(one => one.name)"
    )
    assert {"demo: training", "plain: training", "plain: held out: sample"} <= set(names)
    assert browser.get_log("browser") == []
    table = browser.find_element("css selector", "header .scroll").text
    assert "demo" in table and "plain" in table


def test_the_same_run_twice_is_refused(runs: list[Path]) -> None:
    with pytest.raises(ConfigError, match="named twice"):
        read_runs([runs[0], runs[0]])


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    both = [write_run(tmp_path / parent / "run") for parent in ("a", "b")]
    assert [record.name for record in read_runs(both)] == ["a/run", "b/run"]


def test_a_page_that_cannot_be_written_is_one_line(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_page(runs[1:], tmp_path / "file" / "page.html")


def test_long_lines_are_thinned_to_means_and_keep_their_ends() -> None:
    import numpy as np

    tokens = np.arange(1, 5001, dtype=float)
    values = np.where(tokens % 1000 == 0, np.nan, 2 * tokens)
    x, y, together = thinned(tokens, values, most=1000)
    assert (len(x), together, x[-1]) == (1000, 5, 5000)
    assert y[0] == 6 and y[-1] == pytest.approx(2 * np.mean([4996, 4997, 4998, 4999]))


def test_loss_at_a_length_is_the_mean_of_the_farther_half() -> None:
    buckets = tuple(
        PositionBucket(start, stop, stop - start, loss)
        for start, stop, loss in (
            (0, 256, 9.0),
            (256, 512, 4.0),
            (512, 1024, 3.0),
            (1024, 2048, None),
        )
    )
    one = Evaluation("a", "documents", "s", 1, 1, 2048, 4.0, 1, buckets)
    assert (loss_at(one, 512), loss_at(one, 1024), loss_at(one, 2048)) == (4.0, 3.0, None)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"),
        (0.00012, "1.20e-04"),
        (4.56789, "4.568"),
        (0.0, "0"),
        (6543.2, "6,543"),
    ],
)
def test_numbers_in_tables_are_readable(value: float, text: str) -> None:
    assert number_text(value) == text


def luminance(colour: str) -> float:
    """Relative luminance of rgb(r, g, b), as WCAG 2.1 defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
