"""evaluate, analyse and sample with the model cut over ranks, against one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megahybrid.commands.model_ranks import on_model_ranks
from megahybrid.errors import MegahybridError
from megahybrid.parallel.mesh import ParallelMesh
from tests.train.forked import Nursery, Ranks
from tests.train.text_run import Trained, call, refused

SUITE = """
tasks:
  needle: {kind: needle, lengths: [61], depths: [0.5], trials: 3, haystack: {kind: held_out},
    keys: [ab, cd, ef], values: [bad, cab], needle: " {key} {value}", question: " {key}",
    answer: " {value}"}
  ruler: {kind: ruler, tasks: [niah_single_1], lengths: [901], trials: 2}
"""
COMMANDS = {
    "held_out": ["evaluate", "--length", "30", "--max-tokens", "300", "--json"],
    "suite": ["evaluate", "suite.yaml", "--json"],
    "analyse": ["analyse", "--examples", "own.json", "--json"],
    "sample": ["sample", "--prompt", "abcdefg", "--tokens", "9"],
}


@pytest.fixture(scope="module")
def words(trained: Trained) -> Path:
    """A folder with what the commands read."""
    (trained.folder / "suite.yaml").write_text(SUITE)
    tokens = [n % 290 + 2 for n in range(81)]
    own = [{"tokens": tokens, "question": 60, "answer": 71, "needles": [[20, 25]]}]
    (trained.folder / "own.json").write_text(json.dumps(own))
    return trained.folder


def alike(found: Any, expected: Any) -> None:
    """Equal but for the last digits of numbers, and for the time it took."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected.keys() - {"seconds"}:
            alike(found[name], expected[name])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            alike(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    else:
        assert found == expected


@pytest.mark.parametrize("degree", [2, 4])  # four ranks share two heads of keys
@pytest.mark.parametrize("name", COMMANDS)
def test_ranks_tell_once_what_one_process_tells(
    nursery: Nursery,
    trained: Trained,
    words: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    degree: int,
) -> None:
    monkeypatch.chdir(words)
    command, *rest = COMMANDS[name]
    single = call(capsys, command, trained.run, *rest)
    kept = trained.run / "evaluations" / "step-00000008.suite.suite.json"
    kept.unlink(missing_ok=True)
    ranks = Ranks(
        nursery, [command, str(trained.run), *rest, "--tensor", str(degree)], degree, words
    )
    assert ranks.wait() == [0] * degree, ranks.text()
    first, *others = (path.read_text() for path in ranks.outputs)
    assert others == [""] * (degree - 1)
    if name == "sample":
        assert first == single
        return
    alike(json.loads(first), json.loads(single))
    if name == "suite":
        assert json.loads(kept.read_text()) == json.loads(first)


def test_the_command_starts_its_ranks_and_one_tells_what_is_wrong(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", trained.run, "--prompt", "abc", "--tokens", "5", "--device", "cpu"]

    def start(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "megahybrid", *map(str, command), *more],
            capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    done = start("--tensor", "2")
    assert (done.returncode, done.stdout) == (0, call(capsys, *command)), done.stderr
    done = start("--tensor", "3")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == (
        "megahybrid: --tensor=3 does not divide this model's heads and MLP (model.num_heads=4, "
        "num_kv_heads=2, intermediate_size=48). Use 1, 2 or 4.\n"
    )
    assert "--tensor=0 is no number of ranks" in refused(capsys, *command, "--tensor", "0")


def test_ranks_of_a_launcher_must_be_as_many(
    nursery: Nursery, trained: Trained, tmp_path: Path
) -> None:
    ranks = Ranks(nursery, ["evaluate", str(trained.run), "--tensor", "4"], 2, tmp_path)
    assert ranks.wait() == [2, 2]
    assert "--tensor=4 is not the number of ranks that torchrun has started (2)." in ranks.text()


def test_too_little_memory_is_one_line() -> None:
    def work(mesh: ParallelMesh) -> int:
        torch.empty(2**60)
        return 0

    with pytest.raises(MegahybridError, match=r"^out of memory on cpu with --tensor=1 .*shorter"):
        on_model_ranks(work, None, None, "cpu", [])
