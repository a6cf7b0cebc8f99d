"""What a run has read, recomputed and compared with its ledger; one step shown."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from megahybrid.data.mixture import cursor_crc
from megahybrid.data.token_writer import TokenWriter
from megahybrid.data_prep.inspect_dataset import inspect_dataset
from megahybrid.data_prep.pack import pack
from megahybrid.data_prep.show_batch import show_batch
from megahybrid.data_prep.trace import (
    Step,
    audit,
    find_step,
    first_difference,
    load_run,
    open_mixture,
    places_of,
    steps_of,
)
from megahybrid.errors import DataError, MegahybridError
from megahybrid.train.ledger import LEDGER_NAME, EventLine, LedgerWriter, StepLine
from tests.data.corpus import random_documents, tokenizer_info, write_corpus

MODELS = Path(__file__).parents[2] / "configs/models"


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """A run of two stages over two sources, with the ledger that training would write."""
    for seed, name in enumerate(("a", "b")):
        lengths = np.random.default_rng(seed).integers(2, 60, 300).tolist()
        write_corpus(tmp_path / name, lengths, seed=seed)
    return make_run(tmp_path, "run")


@pytest.fixture
def packed_run(tmp_path: Path) -> Path:
    """A run over a plan whose rows are not full, with a note of each document; its stage `long` has
    two of the plan's rows in one."""
    for seed, name in enumerate(("a", "b")):
        lengths = [20, 11, 20, 9, 20, 10, 7] * 30
        documents = random_documents(lengths, seed=seed)
        with TokenWriter(
            tmp_path / f"{name}-documents", tokenizer_info(), has_metadata=True
        ) as writer:
            for number, document in enumerate(documents):
                writer.add_documents(
                    np.append(document, tokenizer_info().eod_id),
                    np.asarray([len(document) + 1]),
                    metadata_lines=[json.dumps({"id": f"{name}{number}"}).encode()],
                )
        pack(tmp_path / f"{name}-documents", tmp_path / name, 32)
    return make_run(tmp_path, "run")


def make_run(
    folder: Path,
    name: str,
    seed: int = 1,
    start: Path | None = None,
    rewind: int | None = None,
) -> Path:
    """rewind: the step after which the run goes three steps back, with the data that follows."""
    stage = {
        "tokens": 2048,
        "lengths": {32: 1},
        "batch_tokens": 256,
        "micro_batch_tokens": 64,
        "weights": {"a": 2, "b": 1},
        "learning_rate": {"kind": "linear", "start": 1e-3, "end": 1e-4},
    }
    config: dict[str, object] = {
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
    if start is not None:
        config["start"] = {"checkpoint": str(start), "take": "all"}
    # JSON is YAML, but for keys that are numbers.
    text = json.dumps(config).replace('"32":', "32:").replace('"64":', "64:")
    (directory / "config.yaml").write_text(text)
    run = load_run(directory)
    mixture = open_mixture(run)
    place = places_of(run, mixture, directory)[0]
    with LedgerWriter(directory / LEDGER_NAME) as writer:

        def event(name: str, step: int, **detail: object) -> None:
            writer.write(EventLine(event=name, step=step, stage="", tokens=0, detail=detail))

        def write(steps: Iterable[Step]) -> None:
            for step in steps:
                tokens = 256 * step.number
                writer.write(
                    StepLine(
                        step=step.number,
                        stage=step.point.stage.name,
                        tokens=tokens,
                        length=step.point.length,
                        source_tokens=mixture.source_tokens(step.state),
                        cursor_crc=cursor_crc(step.state),
                        learning_rate=0.0,
                        loss=1.0,
                        gradient_norm=1.0,
                    )
                )
                if step.number == 10:
                    save(directory, step.number, tokens, step.state)

        steps = list(steps_of(run, mixture, place))
        event("start", place.step, **({"parent": {"checkpoint": str(start)}} if start else {}))
        if rewind is None:
            write(steps)
        else:
            write(steps[:rewind])
            event("rewind", rewind - 3, data=steps[rewind - 1].state)
            again = {rewind - 3: steps[rewind - 1].state}
            write(islice(steps_of(run, mixture, place, again), rewind - 3, None))
    with open(directory / LEDGER_NAME, "a") as file:
        file.write('{"kind": "st')
    return directory


def save(directory: Path, step: int, tokens: int, data: object) -> None:
    folder = directory / f"checkpoints/step-{step:08d}"
    folder.mkdir(parents=True)
    kept = {"train_state": {"step": step, "tokens": tokens, "data": data}}
    (folder / "manifest.json").write_text(json.dumps(kept))


def test_ledger_of_a_run_is_what_its_config_gives(run_directory: Path) -> None:
    found = audit(run_directory)
    assert found.steps == 16 and sum(found.tokens.values()) == 4096
    other = make_run(run_directory.parent, "again")
    assert found.first_step == 1
    assert first_difference(found, audit(other)) is None
    assert audit(other).rows == found.rows
    assert first_difference(found, audit(make_run(run_directory.parent, "seed", seed=2))) == 1


def spoil_crc(directory: Path) -> None:
    path = directory / "ledger.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[3] = lines[3].replace('"cursor_crc":', '"cursor_crc":1')
    path.write_text("".join(lines))


def spoil_line(directory: Path) -> None:
    path = directory / "ledger.jsonl"
    path.write_text(path.read_text().replace(":", "", 1))


def change_files(directory: Path) -> None:
    save(directory, 12, 0, {"sources": {"a": {"fingerprint": "f" * 64}}})


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_crc, r"step 3: cursor_crc=\d+ is not what this config and these files give"),
        (spoil_line, "ledger.jsonl:1 is not a ledger line"),
        (change_files, r"data.sources.a .* has manifest \w{12}, not ffffffffffff as"),
        (lambda d: (d / "config.yaml").unlink(), "is no run: it has no config.yaml"),
        (lambda d: (d / "ledger.jsonl").unlink(), "ledger.jsonl could not be read"),
    ],
)
def test_ledger_that_disagrees_is_named(
    run_directory: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(run_directory)
    with pytest.raises(MegahybridError, match=message):
        audit(run_directory)


def test_branch_is_audited_from_where_it_began(run_directory: Path) -> None:
    saved = run_directory / "checkpoints/step-00000010"
    branch = make_run(run_directory.parent, "branch", start=saved)
    whole, found = audit(run_directory), audit(branch)
    assert (found.first_step, found.steps) == (11, 6) and found.tokens == whole.tokens
    assert first_difference(whole, found) is None
    run = load_run(branch)
    shown = find_step(run, open_mixture(run), "long", 5, branch)
    other = load_run(run_directory)
    assert shown.plans == find_step(other, open_mixture(other), None, 13).plans
    with pytest.raises(DataError, match=r"--step=3 is not a step of the run \(11 to 16\)"):
        find_step(run, open_mixture(run), None, 3, branch)
    # The parent is gone: what there is begins at the branch's own checkpoint, or nowhere.
    shutil.rmtree(run_directory)
    with pytest.raises(DataError, match="gave this run its cursors and is gone"):
        audit(branch)
    save(branch, 12, 256 * 12, find_step(other, open_mixture(other), None, 12).state)
    assert audit(branch).first_step == 13


def test_run_that_went_back_before_a_spike_is_audited(run_directory: Path) -> None:
    found = audit(make_run(run_directory.parent, "spiked", rewind=7))
    assert found.steps == 16 and first_difference(audit(run_directory), found) == 5


def test_step_is_found_from_the_nearest_checkpoint(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(run_directory)
    expected = find_step(run, open_mixture(run), None, 15)
    mixture, planned = open_mixture(run), []
    plan_step = mixture.plan_step
    monkeypatch.setattr(
        mixture, "plan_step", lambda *args: planned.append(args) or plan_step(*args)
    )
    assert find_step(run, mixture, None, 15, run_directory) == expected and len(planned) == 5


def test_step_is_found_by_stage(run_directory: Path) -> None:
    run = load_run(run_directory)
    assert find_step(run, open_mixture(run), "long", 2).number == 10
    assert find_step(run, open_mixture(run), None, 10).point.length == 64
    with pytest.raises(DataError, match=r"--stage=wrong is not a stage of the run \(short, long\)"):
        find_step(run, open_mixture(run), "wrong", 1)
    with pytest.raises(DataError, match=r"--step=9 is not a step of short \(1 to 8\)"):
        find_step(run, open_mixture(run), "short", 9)


def test_step_is_shown_with_its_documents(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "step.svg"
    show_batch(str(run_directory), "long", 1, rows=2, picture=str(picture))
    run = load_run(run_directory)
    sources = Counter(plan.source for plan in find_step(run, open_mixture(run), "long", 1).plans)
    words = "".join(ElementTree.parse(picture).getroot().itertext())
    assert all(f"{count} rows, {count / 4:.1%}" in words for count in sources.values())
    shown = capsys.readouterr().out
    assert "step 9 of the run, 1 of stage long: 4 rows of 64 tokens" in shown
    assert "█" in shown and "▓" in shown and "row 1:" in shown and "row 2:" not in shown
    assert " targets count" in shown


@pytest.mark.parametrize("stage, step", [("short", 1), ("short", 8), ("long", 3)])
def test_what_fills_a_row_is_no_document(
    packed_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    step: int,
) -> None:
    picture = tmp_path / "step.svg"
    show_batch(str(packed_run), stage, step, rows=8, picture=str(picture))
    run = load_run(packed_run)
    plans = find_step(run, open_mixture(run), stage, step).plans
    length = 32 if stage == "short" else 64
    sizes = [[size for _, size in plan.spans] for plan in plans]
    assert any(sum(row) < length for row in sizes)
    shown = capsys.readouterr().out
    found = [block.splitlines() for block in shown.split("\nrow ")[1:]]
    assert len(found) == len(plans)
    for lines, plan, row in zip(found, plans, sizes, strict=True):
        filling = length - sum(row)
        assert f"; {len(row)} documents, " in lines[0]
        assert (f", {filling} filling" in lines[0]) == bool(filling)
        drawn = lines[1]
        assert drawn.count("·") * length // 64 == filling and set(drawn) <= set("█▓·")
        listed = [line for line in lines if " tokens  " in line]
        assert [int(line.split()[1]) for line in listed] == row[:5]
        metadata_lines = [line for line in lines if line.strip().startswith("id ")]
        assert len(metadata_lines) == len(listed) and all(
            f"id {plan.source}" in metadata for metadata in metadata_lines
        )
    boxes = [box.get("fill") for box in ElementTree.parse(picture).getroot()]
    assert boxes.count("#e8e8e8") == sum(sum(row) < length for row in sizes)
    coloured = [box for box in boxes if box and box not in ("black", "white", "#e8e8e8")]
    assert len(coloured) == sum(map(len, sizes)) + 2  # and a bar for each source


def test_names_with_brackets_and_escapes_are_shown_as_they_are(
    run_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = run_directory.parent / "[/red]\x1b[31m"
    write_corpus(place / "a", [9] * 40)
    inspect_dataset(str(place / "a"), None, None, 1)
    shown = capsys.readouterr().out
    assert "[/red]\\x1b[31m/a: 40 documents" in shown and "\x1b" not in shown
