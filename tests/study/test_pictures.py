"""A study's pictures are drawn of what was measured, and of nothing else."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megahybrid.report.study_pictures import draw_study

SEGMENTS = ("begin", "needle", "context", "end")


def row(variant: str, names: dict[str, float]) -> dict[str, Any]:
    figures = {
        name: {"median": value, "least": value / 2, "most": value} for name, value in names.items()
    }
    return {"variant": variant, "seeds": [1, 2], "counted": [1], "figures": figures}


SCORES = {"recall.32": 1.0, "recall.512": 0.5, "recall.32.exact": 0.9, "recall.512.exact": 0.1}
MASSES = {f"recall.32.{k}.{s}": 0.25 for k in ("local", "full", "all") for s in SEGMENTS}
LOSSES = {"loss.books.16-31": 3.0, "loss.books.32-63": 2.9, "loss.books.0-0": 5.0}


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        (SCORES, ["scores"]),
        (SCORES | MASSES, ["scores", "masses"]),
        (SCORES | LOSSES, ["scores", "losses"]),
        ({}, []),
    ],
)
def test_a_picture_for_each_sort_of_figure(
    figures: dict[str, float], expected: list[str], tmp_path: Path
) -> None:
    rows = [row("a", figures), row("b", figures), row("none", {})]
    paths = draw_study(rows, [], tmp_path)
    assert [path.stem for path in paths] == expected
    for path in paths:
        with Image.open(path) as image:
            assert image.width > 1000 and len(image.convert("RGB").getcolors(2**16) or []) > 10


def test_exact_answers_are_drawn_where_columns_name_them(tmp_path: Path) -> None:
    rows = [row("a", SCORES)]
    (tokens,) = draw_study(rows, ["recall.32"], tmp_path)
    before = tokens.read_bytes()
    (exact,) = draw_study(rows, ["recall.32.exact"], tmp_path)
    assert exact.read_bytes() != before
