"""The report: pictures and a page from nothing but a run's directory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megahybrid.errors import MegahybridError
from megahybrid.ledger import EventLine, PositionBucket
from megahybrid.report import write_report
from megahybrid.report.by_position import loss_by_position
from megahybrid.report.figures import running_mean
from megahybrid.report.parts import short_number
from megahybrid.report.plots import loss, throughput
from megahybrid.report.record import read_record
from megahybrid.report.statistics import joined_buckets
from megahybrid.report.style import house_style
from megahybrid.train.ledger import LedgerWriter
from tests.report.synthetic_run import BATCH, STAGES, write_run
from tests.train.listeners.example import step_line

PICTURES = {"overview", "loss", "loss_by_position", "learning_rate", "gradient_norm", "throughput"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "demo", crash_at=80)


@pytest.fixture(scope="module")
def written(run: Path) -> list[Path]:
    return write_report(run)


def test_the_pictures_are_all_drawn_small_and_not_blank(written: list[Path]) -> None:
    pictures = [path for path in written if path.suffix == ".png"]
    assert {path.stem for path in pictures} == PICTURES
    for path in pictures:
        image = Image.open(path)
        assert image.width == 1350
        assert path.stat().st_size < 200_000
        assert len(image.convert("RGB").getcolors(1 << 20) or ()) > 10


def test_steps_that_a_resume_made_void_are_not_drawn(run: Path) -> None:
    record = read_record(run)
    assert [line.step for line in record.steps] == list(range(1, 197))
    assert np.all(np.diff(record.column("tokens")) == BATCH)


def test_stages_are_bands_that_follow_one_another(run: Path) -> None:
    stages = read_record(run).stages
    assert [(s.name, s.longest, len(s.steps)) for s in stages] == list(STAGES)
    assert stages[0].begin == 0
    assert [s.begin for s in stages[1:]] == [s.end for s in stages[:-1]]


def test_an_empty_bucket_is_a_gap_in_its_curve_and_a_hatched_band(run: Path) -> None:
    with house_style():
        figure = loss_by_position(read_record(run))
    assert figure is not None
    short, full = figure.axes
    curve = short.get_lines()[0].get_ydata()
    assert np.isnan(curve[-1]) and not np.isnan(curve[:-1]).any()
    assert "no data" in [text.get_text() for text in short.get_legend().get_texts()]
    assert "no data" not in [text.get_text() for text in full.get_legend().get_texts()]
    assert not np.isnan(full.get_lines()[0].get_ydata()).any()


def bucket(start: int, stop: int, tokens: int, loss: float | None) -> PositionBucket:
    return PositionBucket(start, stop, tokens, loss)


def test_buckets_of_few_targets_join_their_neighbours_and_keep_the_mean() -> None:
    buckets = [
        bucket(0, 1, 2, 9.0),
        bucket(1, 2, 2, 5.0),
        bucket(2, 4, 100, 3.0),
        bucket(4, 8, 120, 2.0),
        bucket(8, 16, 30, 4.0),
        bucket(16, 32, 0, None),
        bucket(32, 64, 7, 1.0),
    ]
    joined = joined_buckets(buckets, least_tokens=100)
    assert [(b.start, b.stop, b.tokens) for b in joined] == [
        (0, 4, 104), (4, 16, 150), (16, 32, 0), (32, 64, 7),
    ]  # fmt: skip
    assert [b.loss for b in joined] == [pytest.approx(328 / 104), pytest.approx(2.4), None, 1.0]


def test_loss_by_position_has_a_curve_for_each_stage(run: Path) -> None:
    record = read_record(run)
    assert [one.stage for one in record.at_stage_ends("sample")] == ["short", "medium", "long"]
    assert {one.rows for one in record.at_stage_ends("sample")} == {"documents"}


def test_axes_carry_their_units(run: Path) -> None:
    with house_style():
        axes = loss(read_record(run)).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens seen", "loss (nats per token)")
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["training", "held out: sample", "held out: longest", "update skipped"]
    assert "medium · 1,024" in [text.get_text() for text in axes.texts]


def test_mfu_has_a_panel_of_its_own_only_where_it_is_known(tmp_path: Path) -> None:
    with house_style():
        known = throughput(read_record(write_run(tmp_path / "gpu", mfu=0.4)))
        unknown = throughput(read_record(write_run(tmp_path / "cpu")))
    assert known is not None and unknown is not None
    assert [len(known.axes), len(unknown.axes)] == [2, 1]


def test_a_run_of_one_step_and_no_evaluation_still_has_a_report(tmp_path: Path) -> None:
    with LedgerWriter(tmp_path / "ledger.jsonl") as writer:
        writer.write(step_line(1))
    written = write_report(tmp_path)
    assert {path.stem for path in written} == PICTURES - {"overview", "loss_by_position"} | {
        "report"
    }
    assert "running, or was cut short" in written[0].read_text()


def test_a_run_whose_every_number_is_missing_still_has_a_report(tmp_path: Path) -> None:
    empty = {"loss": None, "gradient_norm": None, "tokens_per_second": None, "skipped": True,
             "gradient_norm_by_kind": {}}  # fmt: skip
    with LedgerWriter(tmp_path / "ledger.jsonl") as writer:
        for step in (1, 2, 3):
            writer.write(step_line(step, **empty))
        detail = {"set": "a", "length": 8, "loss": None, "tokens": 0, "by_position": []}
        writer.write(EventLine(event="evaluate", step=3, stage="short", tokens=300, detail=detail))
    assert {path.stem for path in write_report(tmp_path)} == {"report", "loss", "learning_rate"}


def test_names_from_the_ledger_cannot_inject_markup(tmp_path: Path) -> None:
    with LedgerWriter(tmp_path / "ledger.jsonl") as writer:
        writer.write(step_line(1, stage="<script>x</script>"))
        writer.write(
            EventLine(event="warning", step=1, stage="s", tokens=1, detail={"m": "<b>$name</b>"})
        )
    html = write_report(tmp_path)[0].read_text()
    assert "<script>x" not in html and "<b>$name" not in html
    assert "&lt;b&gt;$name&lt;/b&gt;" in html


@pytest.mark.parametrize(
    ("lines", "message"), [(None, "could not be read"), ([], "holds no step yet")], ids=str
)
def test_a_directory_without_steps_is_one_clear_line(
    tmp_path: Path, lines: list | None, message: str
) -> None:
    if lines is not None:
        (tmp_path / "ledger.jsonl").write_text("")
    with pytest.raises(MegahybridError, match=message):
        write_report(tmp_path)


def test_the_running_mean_leaves_gaps_out() -> None:
    values = np.arange(400, dtype=float)
    values[200] = np.nan
    means = running_mean(values)
    assert means[100] == pytest.approx(100)
    assert means[200] == pytest.approx(200)
    assert means[0] == pytest.approx(np.mean([0, 1, 2, 3, 4]))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (256.0, "256"), (1.5e6, "1.5M"), (2e12, "2T"), (999_999.0, "1M")],
)
def test_numbers_on_axes_are_short(value: float, text: str) -> None:
    assert short_number(value) == text


def test_drawing_a_report_needs_no_torch(run: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from megahybrid.report import write_report; "
        f"write_report(Path({str(run)!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
