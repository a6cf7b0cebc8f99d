"""Pictures of needles, RULER and attention out of what the commands kept."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megahybrid.errors import MegahybridError
from megahybrid.evaluate.attention import Attention, to_json
from megahybrid.report import write_report
from megahybrid.report.answers import by_length, head_map, mass_bars, needle_map, newest
from tests.report.synthetic_run import write_run

LENGTHS, DEPTHS = (1024, 4096, 16_384), (0.0, 0.5, 1.0)


def needle_rows() -> list[dict[str, Any]]:
    return [
        {"length": length, "depth": depth, "exact": 1 / (1 + n * depth)}
        for n, length in enumerate(LENGTHS)
        for depth in DEPTHS
    ]


def figures() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    mass = torch.rand(8, 4, 4, generator=draw)
    heads = torch.rand(8, 4, generator=draw)
    attention = Attention(
        mass / mass.sum(-1, keepdim=True), 4 * heads, heads, heads, heads, heads / 4,
        torch.rand(8, 4, 3), (10, 20, 30, 40), torch.rand(8, 4, 2), (0, 1, 2),
    )  # fmt: skip
    return to_json(attention, ["local", "local", "local", "global"] * 2, 0.1)


def keep(run: Path, name: str, result: dict[str, Any]) -> None:
    (run / "evaluations").mkdir(exist_ok=True)
    (run / "evaluations" / name).write_text(json.dumps(result))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = write_run(tmp_path / "demo")
    ruler = [
        {"task": task, "length": length, "score": 0.5, "standard_error": 0.1, "trials": 5}
        for task in ("vt", "cwe")
        for length in LENGTHS
    ]
    recall = [{"length": length, "token_accuracy": 0.7} for length in LENGTHS]
    tasks = {
        "single": {
            "kind": "needle", "variant": "single", "haystack": "noise", "trials": 4,
            "rows": needle_rows(),
        },
        "ruler": {"kind": "ruler", "trials": 5, "rows": ruler},
        "pairs": {"kind": "recall", "trials": 5, "rows": recall, "by_length": recall},
    }  # fmt: skip
    keep(run, "step-00000150.suite.long.json", {"tasks": {}})
    keep(run, "step-00000196.suite.long.json", {"trained_length": 4096, "tasks": tasks})
    told = {"task": "needle", "length": 4096, "depth": 0.5, "trials": 8, "exact": 0.25}
    keep(run, "step-00000196.attention.needle.json", {"results": [told | {"attention": figures()}]})
    return run


def test_report_shows_the_newest_needles_ruler_puzzles_and_attention(run: Path) -> None:
    assert [(one.kind, one.step) for one in newest(run)] == [("attention", 196), ("suite", 196)]
    written = write_report(run)
    html = written[0].read_text()
    expected = {
        "needle_long_single": "Needle in a haystack (single, hay: noise), step 196",
        "ruler_long_ruler": "RULER at step 196",
        "puzzle_long_pairs": "pairs (recall) at step 196",
        "attention_needle_0": "needle at 50% depth, 8 examples (25% answered)",
        "heads_needle_0": "while answering",
    }
    for name, caption in expected.items():
        picture = next(path for path in written if path.stem == name)
        image = Image.open(picture)
        assert image.width == 1350 and len(image.convert("RGB").getcolors(1 << 20) or ()) > 10
        assert caption in html


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
        newest(run)
