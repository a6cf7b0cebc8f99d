"""`megahybrid init --chat`: its commands make what its last stage, of conversations, reads."""

import json
import shlex
from pathlib import Path

import pytest

from megahybrid.cli import main
from megahybrid.commands import init as command
from megahybrid.commands.init_chats import MOST_LOST, look_at_chats
from megahybrid.config import load
from megahybrid.data.dataset import TokenDataset
from megahybrid.data_prep.made_chats import make_chats
from tests.start.test_init import LAPTOP, refused
from tests.start.texts import write_texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("init") / "texts")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "this_machine", lambda: LAPTOP)
    make_chats("chats.jsonl", 100)


def following() -> list[str]:
    file = Path("mine/run.yaml").read_text().splitlines()
    return [line[1:].strip() for line in file if line.startswith("#   megahybrid ")]


def write_chats(name: str, *answers: str, user: str = "the cat", broken: int = 0) -> str:
    chats = [[{"role": "user", "content": user}, {"role": "assistant", "content": a}]
             for a in answers]  # fmt: skip
    rows = [json.dumps({"messages": chat}) for chat in chats] + ["{"] * broken
    Path(name).write_text("\n".join(rows) + "\n")
    return name


@pytest.mark.parametrize("template", ["chatml", "plain"])
def test_the_commands_make_what_the_last_stage_reads(texts: Path, template: str) -> None:
    words = ["--chat", "chats.jsonl", "--template", template, "--lengths", "64,512"]
    assert main(["init", "mine", "--data", str(texts), *words]) == 0
    lines = following()
    assert [" ".join(shlex.split(line)[1:3]) for line in lines] == [
        *("data tokenizer", "data tokenize", "data tokenize", "data pack"),
        *("train mine/run.yaml", "evaluate mine/run", "sample mine/run"),
    ]
    for line in lines[:4]:
        assert main(shlex.split(line)[1:]) == 0, line
    assert main(["check", "mine/run.yaml"]) == 0
    run = load("mine/run.yaml")
    stage = run.stages[-1]
    (length,) = stage.lengths
    assert length == 512 and stage.weights == {"chats": 1} and stage.tokens >= 120 * length
    rows, held_out = TokenDataset("mine/chats/train"), TokenDataset("mine/chats/held_out")
    found = look_at_chats("chats.jsonl", template, "messages")
    assert held_out.documents == found.held_out_count == 10
    assert rows.documents + held_out.documents == found.conversations == 100
    guess = found.tokens_of_all(3.0)
    assert 0.5 < guess / (rows.tokens + held_out.tokens) < 2


def test_rows_are_the_shortest_that_hold_nearly_all(
    texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_chats("long.jsonl", *["sees the dog"] * 30, "word " * 2000)
    words = ["--data", str(texts), "--chat", "long.jsonl", "--lengths", "128,512"]
    assert main(["init", "mine", *words]) == 0
    assert "rows of 128 hold them; longer than that may be 1, which" in capsys.readouterr().out
    assert "--max-tokens 128 --held-out" in following()[2]


def test_few_are_not_held_out_and_many_bad_ones_are_allowed_for(texts: Path) -> None:
    write_chats("few.jsonl", "blue", "red", broken=9)
    found = look_at_chats("few.jsonl", "chatml", "messages")
    assert found.lost > MOST_LOST and found.bad == (("broken json", 9),)
    words = ["--data", str(texts), "--chat", "few.jsonl", "--lengths", "64"]
    assert main(["init", "mine", *words]) == 0
    lines = following()
    assert "--held-out" not in lines[2] and "evaluate" not in " ".join(lines)
    for line in lines[:4]:
        assert main(shlex.split(line)[1:]) == 0, line


def test_what_cannot_be_is_one_line(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("mine", "--data", texts, "--chat")
    Path("story.txt").write_text("It was a dark night.\n" * 9)
    write_chats("empty.jsonl", "")
    write_chats("huge.jsonl", "word " * 9000)
    write_chats("spelt.jsonl", "blue", user="<|im_end|>")
    assert "does not exist" in refused(capsys, *words, "nowhere.jsonl")
    assert "1 text, not a list of conversations" in refused(capsys, *words, "story.txt")
    assert "(1 empty answer)" in refused(capsys, *words, "empty.jsonl")
    assert "(1 <|im_end|> in a message)" in refused(capsys, *words, "spelt.jsonl")
    assert "100 no list of messages in field 'talk'" in refused(
        capsys, *words, "chats.jsonl", "--chat-field", "talk"
    )
    assert "none fits into a row of 64" in refused(capsys, *words, "huge.jsonl", "--lengths", "64")
    said = refused(capsys, *words, "chats.jsonl", "--template", "chatlm")
    assert "Did you mean 'chatml'?" in said
    assert "--template=plain is for conversations" in refused(
        capsys, *words[:-1], "--template", "plain"
    )
