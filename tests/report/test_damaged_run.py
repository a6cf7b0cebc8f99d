"""A run whose files hold what they should not: one line says which, or the page is drawn."""

import copy
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megahybrid.cli import main
from megahybrid.errors import MegahybridError
from megahybrid.report.page import content, read_runs
from megahybrid.report.watch import Watched
from tests.report.draw_damaged import draw
from tests.report.synthetic_answers import write_answers
from tests.report.synthetic_run import write_run

DEEP: Any = {}
for _ in range(300):
    DEEP = {"a": [DEEP]}
WRONG: tuple[Any, ...] = (
    None, "text", "", [], {}, True, -1, 0, 1.5, 10**30, 10**4000, 1e308, math.nan, math.inf,
    [None], [[]], {"a": None}, {"": {}}, "\ud800", DEEP,
)  # fmt: skip
LEFT_OUT = object()
Steps = tuple[str | int, ...]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of line and of result, and few of each, so that a page is drawn quickly."""
    run = write_answers(write_run(tmp_path_factory.mktemp("whole") / "run", sampled=True))
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    few = [one for one in lines if one["kind"] == "event" or one["step"] % 24 == 1]
    (run / "ledger.jsonl").write_text("".join(json.dumps(one) + "\n" for one in few))
    content(read_runs([run]))
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def paths(value: Any, above: Steps = ()) -> Iterator[Steps]:
    """The place of every value within a JSON value; of lists the first and the last item."""
    yield above
    if isinstance(value, dict):
        for name, one in value.items():
            yield from paths(one, (*above, name))
    elif isinstance(value, list):
        for place in sorted({0, len(value) - 1} if value else ()):
            yield from paths(value[place], (*above, place))


def changed(value: Any, steps: Steps, new: Any) -> Any:
    """The value with another one at a place, or without what stood there."""
    if not steps:
        return None if new is LEFT_OUT else new
    value = copy.copy(value)
    if len(steps) == 1 and new is LEFT_OUT:
        del value[steps[0]]
    else:
        value[steps[0]] = changed(value[steps[0]], steps[1:], new)
    return value


def damages(run: Path) -> list[tuple[str, str]]:
    """Files, each with a text that has one value replaced or left out."""
    found = []
    ledger = run / "ledger.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    seen = set()
    for place, line in enumerate(lines):
        for steps in paths(line):
            key = (line.get("event", "step"), tuple(s for s in steps if isinstance(s, str)))
            if key not in seen:
                seen.add(key)
                for new in (*WRONG, LEFT_OUT):
                    bad = [*lines[:place], changed(line, steps, new), *lines[place + 1 :]]
                    found.append((str(ledger), "".join(json.dumps(one) + "\n" for one in bad)))
    for path in sorted((run / "evaluations").iterdir()):
        whole = json.loads(path.read_text())
        for steps in paths(whole):
            found += [
                (str(path), json.dumps(changed(whole, steps, new))) for new in (*WRONG, LEFT_OUT)
            ]
    return found


def test_one_wrong_value_anywhere_is_one_line_or_a_page(run: Path, tmp_path: Path) -> None:
    found = damages(run)
    assert len(found) > 3000
    many = int(os.environ.get("MEGAHYBRID_TEST_DAMAGES", "120"))
    chosen = random.Random(3).sample(found, min(many, len(found)))
    chosen.append((str(run / "ledger.jsonl"), (run / "ledger.jsonl").read_text()))
    given = tmp_path / "damages.json"
    given.write_text(json.dumps({"run": str(run), "damages": chosen}))
    script = Path(__file__).with_name("draw_damaged.py")
    root = str(Path(__file__).parents[2])
    ended = subprocess.run(
        [sys.executable, "-W", "error", script, given], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": root}, timeout=280,
    )  # fmt: skip
    said = json.loads(ended.stdout)
    bad = [one for one in said if "\n" in one or len(one) > 2000]
    assert not bad, bad[0]
    assert sum(one != "" for one in said) > many // 3
    assert said[-1] == ""  # the whole run


TORN = {
    "ten thousand lists": b"[" * 10_000 + b"]" * 10_000 + b"\n",
    "ten thousand lists inside a line": b'{"kind":"event","event":"warning","step":1,"stage":"a",'
    b'"tokens":1,"detail":{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}}\n",
    "a number of five thousand digits": b'{"kind":"step","step":' + b"9" * 5000 + b"}\n",
    "bytes": bytes(range(128, 256)) + b"\n",
    "NUL": b"\0\0\0\0\n",
    "a list": b"[]\n",
}


@pytest.mark.parametrize("name", TORN)
def test_what_is_no_line_of_a_ledger_is_one_line(
    run: Path, name: str, capsys: pytest.CaptureFixture
) -> None:
    ledger = run / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join([*lines[:3], TORN[name], *lines[3:]]))
    for command in (["report", str(run), "--html"], ["compare", str(run), str(run)]):
        assert main(command) == 2
        told = capsys.readouterr()
        assert told.err.count("\n") == 1 and "ledger.jsonl" in told.err and told.out == ""


@pytest.mark.parametrize("text", ["[" * 10_000, '{"tasks": ' * 10_000, "\ufeff{}", "null", "[]"])
def test_what_is_no_result_is_one_line(run: Path, text: str) -> None:
    path = run / "evaluations" / "step-00000001.suite.x.json"
    path.write_text(text)
    assert str(path) in draw(run)


def test_samples_of_any_bytes_are_shown_and_a_folder_of_that_name_is_one_line(run: Path) -> None:
    (run / "samples.txt").write_bytes(bytes(range(256)) * 4)
    assert draw(run) == ""
    (run / "samples.txt").unlink()
    (run / "samples.txt").mkdir()
    assert "samples.txt cannot be used" in draw(run)


def test_a_model_whose_every_bucket_is_lost_still_has_a_page(run: Path) -> None:
    ledger = run / "ledger.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    for line in lines:
        for bucket in line.get("detail", {}).get("by_position", []):
            bucket |= {"loss": None} if line["step"] % 2 else {"tokens": 0}
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert draw(run) == ""


def test_a_run_that_is_deleted_while_it_is_watched_is_one_line(run: Path) -> None:
    watched = Watched([run])
    version = watched.state("")["version"]
    shutil.rmtree(run)
    with pytest.raises(MegahybridError, match="could not be read"):
        watched.state(version)


@pytest.mark.parametrize(
    "parent",
    [
        "text", [], 7, True, {}, {"checkpoint": 7, "take": "all"}, {"checkpoint": "a"},
        {"checkpoint": "a\0b", "take": "weights"}, {"checkpoint": "a", "take": []},
        {"checkpoint": "a", "take": "all", "step": "x", "tokens": 1},
        {"checkpoint": "a", "take": "all", "step": 1},
        {"checkpoint": "\x1b[2Ja" * 3, "take": "all"}, {"checkpoint": "a" * 10_000, "take": "all"},
    ],
)  # fmt: skip
def test_compare_of_runs_whose_parent_is_nonsense_ends_in_words(
    run: Path, parent: Any, capsys: pytest.CaptureFixture
) -> None:
    ledger = run / "ledger.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    lines[0]["detail"]["parent"] = parent
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code = main(["compare", str(run), str(run)])
    told = capsys.readouterr()
    assert code == 0 or (code == 2 and told.err.count("\n") == 1)
    assert "\x1b" not in told.out + told.err and len(told.out + told.err) < 30_000
