"""The benchmark of context gain times each context beside the plain loss."""

from pathlib import Path

import pytest

from benchmarks import context_gain


def test_each_context_is_timed_beside_the_plain_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["--shape", "tiny", "--length", "96", "--contexts", "16", "32"]
    assert context_gain.main(asked) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[:2] for line in lines[1:]] == [["| 16", "79"], ["| 32", "63"]]
    assert list((tmp_path / "build/bench").glob("context_gain_cpu*.json"))
