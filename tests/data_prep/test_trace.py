"""What a run has read, recomputed and compared with its ledger; one step shown."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.show_batch import show_batch
from data_prep.trace import audit, find_step, first_difference, load_run, open_mixture, steps_of
from megahybrid.data.mixture import cursor_crc
from megahybrid.errors import DataError
from tests.data.corpus import write_corpus

MODELS = Path(__file__).parents[2] / "configs/models"


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """A run of two stages over two sources, with the ledger that training would write."""
    for seed, name in enumerate(("a", "b")):
        lengths = np.random.default_rng(seed).integers(2, 60, 300).tolist()
        write_corpus(tmp_path / name, lengths, seed=seed)
    return make_run(tmp_path, "run")


def make_run(folder: Path, name: str, seed: int = 1) -> Path:
    stage = {
        "tokens": 2048,
        "lengths": {32: 1},
        "batch_tokens": 256,
        "micro_batch_tokens": 64,
        "weights": {"a": 2, "b": 1},
        "learning_rate": {"kind": "linear", "start": 1e-3, "end": 1e-4},
    }
    config = {
        "include": [str(MODELS / "rope_tiny.yaml")],
        "seed": seed,
        "data": {
            "sources": {source: {"path": str(folder / source)} for source in ("a", "b")},
            "block_tokens": 256,
            "lanes": 4,
        },
        "stages": [
            {"name": "short", **stage},
            {"name": "long", **stage, "lengths": {64: 1}, "weights": {"a": 1, "b": 1}},
        ],
    }
    directory = folder / name
    directory.mkdir()
    # JSON is YAML, but for keys that are numbers.
    text = json.dumps(config).replace('"32":', "32:").replace('"64":', "64:")
    (directory / "config.yaml").write_text(text)
    run = load_run(directory)
    lines: list[dict[str, object]] = [{"kind": "event", "event": "start", "step": 0}]
    mixture = open_mixture(run)
    for step in steps_of(run, mixture):
        line = {
            "kind": "step",
            "step": step.number,
            "length": step.point.length,
            "source_tokens": mixture.source_tokens(step.state),
            "cursor_crc": cursor_crc(step.state),
        }
        lines.append(line)
        if step.number == 9:  # an attempt that was lost, and one that went on from step 7
            again = lines[-2:]
            lines.append({"kind": "step", "step": 10, "cursor_crc": 5})
            lines.append({"kind": "event", "event": "resume", "step": 7})
            lines += again
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "ledger.jsonl").write_text(text + '{"kind": "st')
    return directory


def test_ledger_of_a_run_is_what_its_config_gives(run_directory: Path) -> None:
    found = audit(run_directory)
    assert found.steps == 16 and sum(found.tokens.values()) == 4096
    other = make_run(run_directory.parent, "again")
    assert first_difference(found, audit(other)) is None
    assert audit(other).rows == found.rows
    assert first_difference(found, audit(make_run(run_directory.parent, "seed", seed=2))) == 1


def spoil_crc(directory: Path) -> None:
    path = directory / "ledger.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[3] = lines[3].replace('"cursor_crc": ', '"cursor_crc": 1')
    path.write_text("".join(lines))


def spoil_line(directory: Path) -> None:
    path = directory / "ledger.jsonl"
    path.write_text(path.read_text().replace('{"kind"', "{", 1).replace(":", "", 1))


def change_files(directory: Path) -> None:
    saved = directory / "checkpoints/step-00000010"
    saved.mkdir(parents=True)
    state = {"data": {"sources": {"a": {"fingerprint": "f" * 64}}}}
    (saved / "manifest.json").write_text(json.dumps({"train_state": state}))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_crc, r"step 3: cursor_crc=\d+ is not what this config and these files give"),
        (spoil_line, "line 1 is no line of a ledger"),
        (change_files, r"data.sources.a .* has manifest \w{12}, not ffffffffffff as"),
        (lambda d: (d / "config.yaml").unlink(), "is no run: it has no config.yaml"),
        (lambda d: (d / "ledger.jsonl").unlink(), "ledger.jsonl cannot be read"),
    ],
)
def test_ledger_that_disagrees_is_named(
    run_directory: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(run_directory)
    with pytest.raises(DataError, match=message):
        audit(run_directory)


def test_step_is_found_by_stage(run_directory: Path) -> None:
    run = load_run(run_directory)
    assert find_step(run, open_mixture(run), "long", 2).number == 10
    assert find_step(run, open_mixture(run), None, 10).point.length == 64
    with pytest.raises(DataError, match=r"--stage=wrong is not a stage of the run \(short, long\)"):
        find_step(run, open_mixture(run), "wrong", 1)
    with pytest.raises(DataError, match=r"--step=9 is not a step of short \(1 to 8\)"):
        find_step(run, open_mixture(run), "short", 9)


def test_step_is_shown_with_its_documents(
    run_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show_batch(str(run_directory), "long", 1, rows=2)
    shown = capsys.readouterr().out
    assert "step 9 of the run, 1 of stage long: 4 rows of 64 tokens" in shown
    assert "█" in shown and "▓" in shown and "row 1:" in shown and "row 2:" not in shown
    assert " targets count" in shown
