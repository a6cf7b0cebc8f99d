"""The benchmark of a scheme's parts runs each of them, and its intervals are those of medians."""

from pathlib import Path

import pytest

from benchmarks import scheme_cost


def test_every_part_is_timed_beside_the_model_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert scheme_cost.main(["--shape", "tiny", "--length", "64", "--pairs", "1"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0][2:] for line in lines[1:]] == list(scheme_cost.CASES)
    assert list((tmp_path / "build/bench").glob("scheme_cost_cpu*.json"))


def test_an_interval_holds_the_median_and_no_outlier() -> None:
    low, high = scheme_cost.interval([1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 9.0])
    assert 0.98 <= low <= 1.0 <= high <= 1.02
