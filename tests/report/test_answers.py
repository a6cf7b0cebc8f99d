"""Pictures of needles, RULER and attention out of what the commands kept."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megahybrid.errors import MegahybridError
from megahybrid.report import write_report
from megahybrid.report.answers import by_length, head_map, mass_bars, needle_map
from megahybrid.report.evaluation_files import newest_evaluations
from tests.report.synthetic_answers import DEPTHS, figures, needle_rows, write_answers
from tests.report.synthetic_run import write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_answers(write_run(tmp_path / "demo"))


def test_report_shows_the_newest_needles_ruler_puzzles_and_attention(run: Path) -> None:
    assert [(one.kind, one.step) for one in newest_evaluations(run)] == [
        ("attention", 196), ("context_gain", 196), ("lm_eval", 196), ("loss", 196),
        ("suite", 196),
    ]  # fmt: skip
    written = write_report(run)
    for name in (
        "needle_long_single", "ruler_long_ruler", "puzzle_long_pairs", "attention_needle_needle",
        "heads_needle_needle",
    ):  # fmt: skip
        picture = next(path for path in written if path.stem == name)
        image = Image.open(picture)
        assert image.width == 1350 and len(image.convert("RGB").getcolors(1 << 20) or ()) > 10


def test_needle_map_has_each_rate_in_its_cell_and_marks_the_trained_length() -> None:
    figure = needle_map(needle_rows(), "single", trained=4096)
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == [
        f"{1 / (1 + n * depth):.2f}" for depth in DEPTHS for n in range(3)
    ]
    assert [line.get_xdata()[0] for line in axes.lines] == [1.5, 1.5]
    assert not needle_map(needle_rows(), "single", trained=None).axes[0].lines


def test_mass_bars_end_at_one_and_heads_above_the_threshold_are_marked() -> None:
    told = figures()
    bars = [bar for bar in mass_bars(told).axes[0].patches]
    assert len(bars) == 32
    ends = [bar.get_x() + bar.get_width() for bar in bars[-8:]]
    np.testing.assert_allclose(ends, 1, rtol=1e-6)
    assert len(head_map(told).axes[0].texts) == len(told["retrieval_heads"]) > 0


def test_one_length_alone_is_drawn() -> None:
    row = {"task": "vt", "length": 512, "score": 0.5, "standard_error": None}
    assert by_length([row], "one", trained=512).axes[0].get_xlabel() == "tokens"


def test_damaged_result_is_named(run: Path) -> None:
    (run / "evaluations" / "step-00000001.suite.x.json").write_text("{")
    with pytest.raises(MegahybridError, match="x.json is damaged"):
        newest_evaluations(run)
