"""Files of a run that somebody edited by hand, and signed again: one line, and nothing is built."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megahybrid import cli
from tests.checkpoint.test_damage import rewrite
from tests.train.forked import Nursery, Ranks
from tests.train.text_run import Trained


@pytest.fixture
def edited(trained: Trained, tmp_path: Path) -> Path:
    """A copy of a trained run, and no other checkpoint but its newest."""
    shutil.copytree(trained.run, tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    for other in (tmp_path / "run" / "checkpoints").glob("step-*"):
        if other != newest:
            shutil.rmtree(other)
    return newest


def commands(newest: Path, trained: Trained) -> list[list[str]]:
    run = newest.parents[1]
    return [
        ["checkpoint", "list", str(run)],
        ["checkpoint", "show", str(newest)],
        ["checkpoint", "verify", str(run)],
        ["checkpoint", "diff", str(newest), str(newest)],
        ["evaluate", str(run), "--device", "cpu"],
    ]


def goes_on(nursery: Nursery, newest: Path, trained: Trained) -> tuple[int, str]:
    """How the same run goes on, by another layout."""
    words = ["train", str(trained.folder / "run.yaml"), "parallel.tensor=1"]
    ranks = Ranks(nursery, [*words, f"directory={newest.parents[1]}"], 1, newest.parents[2])
    (code,) = ranks.wait(30)
    assert "Traceback" not in ranks.text() and "\x1b" not in ranks.text(), ranks.text()
    return code, ranks.last_line()


def one_line(capsys: pytest.CaptureFixture[str], words: list[str]) -> tuple[int, str]:
    """A command's code and what it told: no traceback, and of an error one line."""
    code = cli.main(words)
    told = capsys.readouterr()
    assert code in (0, 2), (words, told.err)
    assert "Traceback" not in told.err and "\x1b" not in told.out + told.err
    if code:
        assert told.err.startswith("megahybrid: "), told.err
    return code, told.err


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "tokens": lambda values: values.update(tokens=10**30),
    "kernels": lambda values: values["train_state"].update(kernels=5),
    "a kernel": lambda values: values["train_state"]["kernels"].update(full="rm -rf"),
    "schemes": lambda values: values["train_state"].update(schemes=5),
    "a list of schemes": lambda values: values["train_state"].update(schemes=[1]),
    "parent": lambda values: values["train_state"].update(parent=5),
    "a negative step": lambda values: values["train_state"].update(step=-5),
    "a step of text": lambda values: values["train_state"].update(step="x"),
    "time": lambda values: values["written_by"].update(time_unix=1e300),
    "ranks": lambda values: values["written_by"].update(ranks="\x1b[2J"),
    "a wider model": lambda values: values["config"]["model"].update(hidden_size=2**22),
    "a deeper model": lambda values: values["config"]["model"]["layer_plan"].update(
        num_layers=10**9
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_manifest_is_one_line(
    edit: str,
    edited: Path,
    trained: Trained,
    nursery: Nursery,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rewrite(edited, EDITS[edit])
    of_the_config = edit.endswith("model")
    codes = [one_line(capsys, words)[0] for words in commands(edited, trained)]
    # `list` tells of damage and succeeds; config is what a run or an evaluation reads.
    assert codes == ([0, 0, 0, 0, 2] if of_the_config else [0, 2, 2, 2, 2])
    code, told = goes_on(nursery, edited, trained)
    assert code == 2 and told.startswith("megahybrid: ")


def test_what_a_manifest_says_cannot_steer_the_terminal(
    edited: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;pwned\x07\x1b[2J"
    rewrite(
        edited,
        lambda values: (
            values.update(model_fingerprint=evil),
            values["written_by"].update(megahybrid=evil),
            values["train_state"].update(parent={"checkpoint": evil, "take": evil}),
        ),
    )
    for words in (["show", str(edited)], ["list", str(edited.parents[1])]):
        assert cli.main(["checkpoint", *words]) == 0
        told = capsys.readouterr().out
        assert "\x1b" not in told and "\\x1b]0;pwned\\x07" in told


LINES: dict[str, Callable[[list[dict[str, Any]]], object]] = {
    "a step of text": lambda lines: lines[5].update(step="5"),
    "a huge step": lambda lines: lines[5].update(step=10**30),
    "no object": lambda lines: lines[0].update(detail=5),
    "a loss of text": lambda lines: [x.update(loss="low") for x in lines if "loss" in x],
    "sources": lambda lines: [
        x.update(source_tokens={"text": "all"}) for x in lines if "source_tokens" in x
    ],
    "a set that is a list": lambda lines: [
        x["detail"].update(set=[1]) for x in lines if x.get("event") == "evaluate"
    ],
}


@pytest.mark.parametrize("edit", LINES)
def test_an_edited_ledger_is_one_line(
    edit: str,
    edited: Path,
    trained: Trained,
    nursery: Nursery,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = edited.parents[1]
    path = run / "ledger.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    LINES[edit](lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, told = goes_on(nursery, edited, trained)
    assert code == 2 and "ledger.jsonl:" in told and "is not a ledger line" in told
    for words in (["report", str(run)], ["compare", str(run), str(run)]):
        code, told = one_line(capsys, words)
        assert code == 2 and "ledger.jsonl:" in told and "is not a ledger line" in told


def test_a_field_to_allow_must_be_one(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["train", str(trained.folder / "run.yaml"), f"directory={tmp_path / 'run'}"]
    for name, words in (
        ("model.layer_plam", "Did you mean 'layer_plan'?"),
        ("seed.more", "('more' is none). Leave it out."),
        (
            "data..lanes",
            "Fields here: sources, held_out, documents, block_tokens, lanes, exhausted, tokenizer.",
        ),
        ("stages.7", "'7' is none"),
        ("optimizr", "Did you mean 'optimizer'?"),
    ):
        code, told = one_line(capsys, [*base, "--allow", name])
        assert code == 2 and f"--allow={name} names no field" in told and words in told
        assert not (tmp_path / "run").exists()


def test_random_edits_of_a_manifest_are_one_line(
    edited: Path, trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    """Types, sizes, missing and more fields, anywhere; what still means the same may pass."""
    draw = random.Random(20)
    good = (edited / "manifest.json").read_text()
    for _ in range(60):
        (edited / "manifest.json").write_text(good)
        rewrite(edited, lambda values: mutate(values, draw))
        for words in commands(edited, trained)[:4]:
            one_line(capsys, words)


VALUES = (
    None,
    True,
    -1,
    0,
    5,
    2**31,
    10**30,
    1.5,
    1e300,
    "",
    "x",
    "\x1b[2J",
    [],
    [1],
    {},
    {"a": 1},
)


def mutate(values: Any, draw: random.Random) -> None:
    """One change at a random place."""
    while isinstance(values, dict | list) and values:
        keys = list(values) if isinstance(values, dict) else list(range(len(values)))
        key = draw.choice(keys)
        inner = values[key]
        if not (isinstance(inner, dict | list) and inner) or draw.random() < 0.25:
            match draw.choice(["set", "set", "drop", "add"]):
                case "set":
                    values[key] = draw.choice(VALUES)
                case "drop":
                    del values[key]
                case "add" if isinstance(values, dict):
                    values["more"] = draw.choice(VALUES)
                case _:
                    values.append(draw.choice(VALUES))  # type: ignore[union-attr]
            return
        values = inner
