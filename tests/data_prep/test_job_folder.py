"""What a `tokenize` job leaves behind binds no other call without need, and says what differs."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megahybrid.data.dataset import TokenDataset
from megahybrid.data_prep import tokenize as tokenize_module
from megahybrid.data_prep.inputs import cut_units
from megahybrid.data_prep.merge import Split
from megahybrid.data_prep.rewrite import shuffle_datasets
from megahybrid.data_prep.tokenize import TokenizeReport, tokenize
from megahybrid.errors import DataError
from tests.data_prep.test_tokenize import contents


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize_module, "cut_units", lambda files, _: cut_units(files, 100))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [{"text": f"text {n} " * (1 + n % 5), "body": f"body {n}"} for n in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(rows: Path, model: Path, output: Path, **options: object) -> TokenizeReport:
    return tokenize([rows], model, output, **{"quiet": True} | options)


def stopped_at(number: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = tokenize_module.encode_unit

    def some(job, unit_number, unit):
        if unit_number == number:
            raise error
        return encode(job, unit_number, unit)

    monkeypatch.setattr(tokenize_module, "encode_unit", some)


FAILED = {
    "no such field": {"text_field": "bdoy"},
    "holds out none": {"held_out": 1e-9},
    "holds out all": {"longest": 40},
}


@pytest.mark.parametrize("first", FAILED)
def test_refused_call_leaves_the_folder_to_any_other(
    first: str, rows: Path, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError):
        run(rows, model, tmp_path / "out", **FAILED[first])
    run(rows, model, tmp_path / "out", text_field="body", seed=3)
    run(rows, model, tmp_path / "fresh", text_field="body", seed=3)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_inputs_without_any_document_leave_no_folder(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="the inputs hold no document"):
        run(tmp_path / "empty.txt", model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(DataError, match="the inputs hold no document \\(1 broken json\\)"):
        run(tmp_path / "bad.jsonl", model, tmp_path / "out")
    assert list(contents(tmp_path / "out")) == ["quarantine.jsonl"]


def test_refused_call_leaves_the_folder_to_other_inputs(
    rows: Path, model: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(rows.read_text() + ("{" + "x" * 999 + "\n") * 30)
    with pytest.raises(DataError, match="is less than what is lost.*broken json"):
        run(bad, model, tmp_path / "out")
    run(rows, model, tmp_path / "out")
    run(rows, model, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_call_that_encoded_nothing_locks_nothing(
    error: BaseException, rows: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stopped_at(0, error, patch)
        with pytest.raises(type(error)):
            run(rows, model, tmp_path / "out")
    run(rows, model, tmp_path / "out", seed=1)
    run(rows, model, tmp_path / "fresh", seed=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_interrupted_work_is_kept_from_a_mistyped_call(
    rows: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stopped_at(5, OSError(errno.ENOSPC, "No space left"), patch)
        with pytest.raises(OSError, match="No space left"):
            run(rows, model, tmp_path / "out")
    before = contents(tmp_path / "out")
    words = (
        r"unfinished job with other inputs or options \(--field was text, is txet\)\. .*\.work\."
    )
    with pytest.raises(DataError, match=words):
        run(rows, model, tmp_path / "out", text_field="txet")
    assert contents(tmp_path / "out") == before
    run(rows, model, tmp_path / "out")
    run(rows, model, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("moment", ["refused", "merging", "publishing"])
def test_units_are_used_again_for_other_parts(
    moment: str, rows: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        if moment == "refused":
            with pytest.raises(DataError, match="holds out none"):
                run(rows, model, tmp_path / "out", held_out=1e-9)
        elif moment == "merging":
            stop(patch, tokenize_module.Merge, "run")
            with pytest.raises(KeyboardInterrupt):
                run(rows, model, tmp_path / "out", held_out=0.3, longest=3)
        else:
            stop(patch, tokenize_module, "sync_folder")
            with pytest.raises(KeyboardInterrupt):
                run(rows, model, tmp_path / "out", held_out=0.3, longest=3)
    with monkeypatch.context() as patch:
        patch.setattr(
            "megahybrid.data_prep.unit_files.RunWriter.add", None
        )  # nothing is encoded again
        run(rows, model, tmp_path / "out", shard_tokens=99, deduplicate=True)
    run(rows, model, tmp_path / "fresh", shard_tokens=99, deduplicate=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def stop(patch: pytest.MonkeyPatch, owner: object, name: str) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    patch.setattr(owner, name, interrupt)


def touch(rows: Path) -> None:
    os.utime(rows, ns=(0, rows.stat().st_mtime_ns + 1))


def append(rows: Path) -> None:
    with open(rows, "a") as file:
        file.write('{"text": "more"}\n')


def rename(rows: Path) -> None:
    shutil.move(rows, rows.with_name("other.jsonl"))


CHANGES: dict[str, Callable[[Path], None]] = {
    r"input .*rows.jsonl was modified at .* UTC, then at .* UTC\)": touch,
    r"input .*rows.jsonl had 2,\d{3} bytes, has 2,\d{3}\)": append,
    r"input .*other.jsonl is new; input .*rows.jsonl is gone\)": rename,
}


@pytest.mark.parametrize("words", CHANGES)
def test_changed_input_of_a_finished_job_is_named(
    words: str, rows: Path, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    moved = shutil.move(rows, tmp_path / "in/rows.jsonl")
    run(tmp_path / "in", model, tmp_path / "out")
    before = contents(tmp_path / "out")
    CHANGES[words](Path(moved))
    with pytest.raises(DataError, match="out is not empty: it was made from .*" + words):
        run(tmp_path / "in", model, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_other_tokenizer_or_missing_part_is_named(rows: Path, model: Path, tmp_path: Path) -> None:
    run(rows, model, tmp_path / "out")
    other = tmp_path / "other.model"
    other.write_bytes(model.read_bytes() + b"\xa2\x06\x00")  # a field that nobody reads
    with pytest.raises(DataError, match=r"the tokenizer has sha256 \w{12} then, \w{12} now"):
        run(rows, other, tmp_path / "out")
    (tmp_path / "out/train/manifest.json").unlink()
    with pytest.raises(DataError, match="says that it is finished, but train/manifest.json is mi"):
        run(rows, model, tmp_path / "out")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "5", "{}", '{"job": 1, "report": 2}', "[" * 100_000, '{"job": {}, "report": {}}'],
)
def test_damaged_job_file_is_one_line(text: str, rows: Path, model: Path, tmp_path: Path) -> None:
    run(rows, model, tmp_path / "out")
    (tmp_path / "out/job.json").write_text(text)
    with pytest.raises(DataError, match="job.json is damaged or not ours"):
        run(rows, model, tmp_path / "out")


@pytest.mark.parametrize("files", ["5", "[1]", '[["a"]]', '{"a": 1}', "null"])
def test_damaged_files_of_a_job_are_one_line(
    files: str, rows: Path, model: Path, tmp_path: Path
) -> None:
    run(rows, model, tmp_path / "out")
    path = tmp_path / "out/job.json"
    value = json.loads(path.read_text())
    value["job"]["files"] = json.loads(files.replace('"a"', json.dumps(str(rows))))
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match="out is not empty: it was made from other"):
        run(rows, model, tmp_path / "out")


def test_fraction_that_holds_out_nothing_is_refused_with_one_that_does(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(5):
        (tmp_path / f"in/{number}.txt").write_text(f"text {number} " * 50)
    with pytest.raises(DataError, match=r"held_out=0.01 holds out none of 5 documents") as told:
        run(tmp_path / "in", model, tmp_path / "out", held_out=0.01)
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == [".work"]
    least = float(str(told.value).split("Use held_out=")[1].split()[0])
    made = run(tmp_path / "in", model, tmp_path / "out", held_out=least)
    assert made.documents == {"train": 4, "held_out": 1}
    with pytest.raises(DataError, match="holds out none of 5 documents"):
        run(tmp_path / "in", model, tmp_path / "less", held_out=least - 0.001)
    run(tmp_path / "in", model, tmp_path / "whole")
    with pytest.raises(DataError, match="held_out=0.01 holds out none of 5 documents"):
        shuffle_datasets([tmp_path / "whole/train"], tmp_path / "parts", split=Split(0.01, 0))
    assert not (tmp_path / "parts").exists()
    assert TokenDataset(tmp_path / "whole/train").documents == 5


def test_file_where_the_output_is_to_be_is_named(rows: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, kind in (("file", "a file"), ("link", "a link to nothing")):
        with pytest.raises(DataError, match=f"{name} is {kind}, not a folder. Name a new folder"):
            run(rows, model, tmp_path / name)
