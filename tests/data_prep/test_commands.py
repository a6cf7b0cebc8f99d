import argparse
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megahybrid.cli.data import add_data_commands
from megahybrid.commands.data import COMMANDS
from megahybrid.data_prep.gather_stdlib import stdlib_documents
from megahybrid.errors import DataError, PathError
from tests.data.corpus import write_corpus


def call(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_data_commands(parser.add_subparsers())
    arguments = parser.parse_args(["data", *words])
    return arguments.run(arguments)


def test_commands_lead_from_text_to_a_verified_dataset(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = f"{tmp_path}/a.model", f"{tmp_path}/out"
    call("tokenizer", str(corpus), "--vocab-size", "400", "--output", model)
    call("tokenize", str(corpus), "--tokenizer", model, "--output", output, "--longest", "1")
    call("verify", f"{output}/train")
    call("inspect", f"{output}/train", "--tokenizer", model, "--documents", "1")
    shown = capsys.readouterr().out
    assert "vocab_size=400" in shown and "299 documents" in shown and ": good. 1 shards" in shown
    assert "tokens per document" in shown and "document 0:" in shown


def test_place_that_cannot_be_written_is_one_line(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    output = f"{tmp_path}/file/a.model"
    with pytest.raises(PathError, match="file cannot be used \\(Not a directory\\)"):
        call("tokenizer", str(corpus), "--vocab-size", "400", "--output", output)


@pytest.mark.parametrize(
    "name, words",
    [
        ("a.png", "a.png is not an .svg, the only format that pictures are drawn in"),
        ("a", "a is not an .svg"),
        (".svg", ".svg is not an .svg"),
        ("nowhere/a.svg", "nowhere, which is not a folder"),
        ("folder.svg", "folder.svg is there already \\(a folder\\)"),
    ],
)
@pytest.mark.parametrize("of", ["dataset", "run"])
def test_picture_that_cannot_be_drawn_is_refused_first(
    of: str,
    name: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "dataset", [5, 9])
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("")
    (tmp_path / "folder.svg").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=words):
        call("inspect", of, "--picture", name)
    assert sorted(tmp_path.rglob("*")) == before and not capsys.readouterr().out


def test_picture_of_files_without_a_manifest_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "data", [5, 9])
    (tmp_path / "data/manifest.json").unlink()
    picture = str(tmp_path / "a.SVG")
    with pytest.raises(DataError, match="has no manifest, so the lengths of its documents are not"):
        call("inspect", f"{tmp_path}/data", "--vocab-size", "1000", "--picture", picture)
    write_corpus(tmp_path / "other", [5, 9])
    call("inspect", f"{tmp_path}/other", "--picture", picture)
    assert Path(picture).read_text().startswith("<svg")


def test_library_of_this_python_is_gathered_in_order(tmp_path: Path) -> None:
    call("gather-stdlib", str(tmp_path / "a.jsonl"))
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    documents = {item["id"]: item["text"] for item in map(json.loads, lines)}
    assert len(documents) == len(lines) > 300
    assert "def dumps(" in documents["lib/json/__init__.py"]
    assert not any("site-packages" in name for name in documents)
    assert list(documents) == [name for name, _ in stdlib_documents()]


def test_every_command_takes_what_its_arguments_are() -> None:
    parser = argparse.ArgumentParser()
    add_data_commands(parser.add_subparsers())
    (data,) = parser._actions[-1].choices.values()  # type: ignore[union-attr]
    commands = data._actions[-1].choices
    assert commands.keys() == COMMANDS.keys() | {"demo"}  # which calls the others
    for name, command in commands.items():
        if name == "demo":
            continue
        taken = {action.dest for action in command._actions} - {"help"}
        assert set(inspect.signature(COMMANDS[name]).parameters) == taken, name


def test_arguments_need_nothing_heavy() -> None:
    script = (
        "import sys, megahybrid.cli.data, megahybrid.commands.data\n"
        "heavy = {'torch', 'numpy', 'sentencepiece', 'tokenizers', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
