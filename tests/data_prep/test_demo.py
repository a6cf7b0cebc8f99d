"""`megahybrid data demo` makes what the demo's run file names, and no step of it twice."""

from pathlib import Path

import pytest

from megahybrid.cli import main
from megahybrid.config import load
from megahybrid.config.missing_data import making_command, missing_data
from megahybrid.data_prep.demo import make_demo

DEMO = "pkg:runs/demo.yaml"


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(killed_at: str | None = None, *, chats: bool = False) -> list[str]:
    """The steps that were taken, none of which computes; one of them may end half-way."""
    taken = []

    def command(words: list[str]) -> None:
        taken.append(words[0])
        output = Path(words[words.index("--output") + 1] if "--output" in words else words[1])
        if words[0] == "tokenize":
            (output / ".work").mkdir(parents=True, exist_ok=True)
            for part in ("train", "held_out", "held_out_long")[: 2 if "--chat" in words else 3]:
                (output / part).mkdir(exist_ok=True)
                (output / part / "manifest.json").touch()
            if words[0] != killed_at:
                (output / ".work").rmdir()
        elif words[0] == "pack":
            output.mkdir(exist_ok=True)
            if words[0] != killed_at:
                (output / "plan.json").touch()
        elif words[0] != killed_at:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.touch()
        if words[0] == killed_at:
            raise KeyboardInterrupt

    try:
        make_demo(command, lambda line: None, chats=chats)
    except KeyboardInterrupt:
        assert killed_at is not None
    return taken


def test_it_makes_all_that_the_demos_run_file_names() -> None:
    run = load(DEMO)
    named = {path for _, path in missing_data(run)}
    assert len(named) == 4 and {making_command(path) for path in named} == {"megahybrid data demo"}
    assert make() == ["gather-stdlib", "tokenizer", "tokenize"]
    assert missing_data(run) == []


def test_with_chats_it_makes_all_that_their_run_file_names() -> None:
    run = load("pkg:runs/demo_chat.yaml")
    named = {making_command(path) for _, path in missing_data(run)}
    assert named == {"megahybrid data demo", "megahybrid data demo --chats"}
    steps = ["gather-stdlib", "tokenizer", "tokenize", "make-chats", "tokenize", "pack"]
    assert make(chats=True) == steps
    assert missing_data(run) == [] and make(chats=True) == []


@pytest.mark.parametrize("killed_at", ["make-chats", "pack"])
def test_chats_go_on_where_they_were_interrupted(killed_at: str) -> None:
    make()
    steps = ["make-chats", "tokenize", "pack"]
    assert make(killed_at, chats=True) == steps[: steps.index(killed_at) + 1]
    assert make(chats=True) == steps[steps.index(killed_at) :]


@pytest.mark.parametrize("killed_at", ["gather-stdlib", "tokenizer", "tokenize"])
def test_it_goes_on_where_it_was_interrupted(killed_at: str) -> None:
    steps = ["gather-stdlib", "tokenizer", "tokenize"]
    assert make(killed_at) == steps[: steps.index(killed_at) + 1]
    assert make() == steps[steps.index(killed_at) :]
    assert make() == []


def test_data_that_are_there_stay_when_the_text_is_gone(empty: Path) -> None:
    make()
    (empty / "build/demo/stdlib.jsonl").unlink()
    assert make() == []


def test_check_and_train_name_the_command_that_makes_missing_data(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["check", DEMO, "--no-files"]) == 0
    assert "not here" not in "".join(capsys.readouterr())
    assert main(["check", DEMO]) == 2
    line = capsys.readouterr().err.splitlines()[0].removeprefix("megahybrid: ")
    assert line.startswith("data not here: build/demo/data/train, build/demo/data/held_out, ")
    assert line.endswith("build/demo/tokenizer.model. Make them with: megahybrid data demo")
    assert main(["train", DEMO, "--processes", "2"]) == 2
    assert capsys.readouterr().err == (
        "megahybrid: data.sources.stdlib.path=build/demo/data/train does not exist. "
        "Make it with: megahybrid data demo\n"
    )
    make()
    assert main(["check", DEMO]) == 0
    assert "not here" not in capsys.readouterr().out
    assert main(["check", DEMO, "data.sources.stdlib.path=data/mine"]) == 2
    assert capsys.readouterr().err.splitlines()[0] == (
        "megahybrid: data not here: data/mine. Prepare the data with `megahybrid data tokenize`, "
        "or correct the path."
    )
