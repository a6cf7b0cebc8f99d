"""`megahybrid init`: what it writes checks and trains, and what it cannot it says in one line."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from megahybrid.cli import main
from megahybrid.commands import init as command
from megahybrid.commands.init_machine import Machine
from megahybrid.commands.init_recipe import SCHEMES, SIZES, read_lengths
from megahybrid.commands.init_texts import BLOCKS, drawn, look
from megahybrid.config import load
from megahybrid.config.packaged import known_names
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.tokenizer import load_tokenizer
from megahybrid.errors import ConfigError
from tests.start.texts import write_texts
from tests.train.forked import Nursery, Ranks

LAPTOP = Machine("cpu", 1, 8 * 2**30, 2)
SERVER = Machine("cuda", 8, 80 * 2**30, 64)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("init") / "texts")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "this_machine", lambda: LAPTOP)
    yield tmp_path


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of a command that must fail with code 2 and write nothing."""
    before = sorted(Path().rglob("*"))
    assert main(["init", *map(str, words)]) == 2
    told = capsys.readouterr()
    assert not told.out and told.err.count("\n") == 1 and told.err.startswith("megahybrid: ")
    assert sorted(Path().rglob("*")) == before
    return told.err


def following(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The three commands that were printed; the file says the same."""
    told = capsys.readouterr().out.splitlines()
    lines = [line.strip() for line in told if line.startswith("  megahybrid ")]
    file = (Path("mine") / "run.yaml").read_text().splitlines()
    assert [line[1:].strip() for line in file if line.startswith("#   megahybrid ")] == lines
    assert len(lines) == 3
    return lines


def test_the_three_commands_make_the_data_and_train(
    texts: Path, here: Path, nursery: Nursery, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "mine", "--data", str(texts), "--lengths", "32,128"]) == 0
    lines = following(capsys)
    assert main(["check", "mine/run.yaml"]) == 2  # no data are there yet
    assert "mine/data/train" in capsys.readouterr().err
    for line in lines[:2]:
        assert main(shlex.split(line)[1:]) == 0
    assert main(["check", "mine/run.yaml"]) == 0
    run = load("mine/run.yaml")
    held_out, train = TokenDataset("mine/data/held_out"), TokenDataset("mine/data/train")
    share = held_out.tokens / (held_out.tokens + train.tokens)
    assert 0.005 < share < 0.2
    found = look(str(texts))
    guess = found.tokens(run.model.vocab_size)
    assert 0.5 < guess / (held_out.tokens + train.tokens) < 2
    held = found.held_out
    assert held is not None and held_out.documents == held.documents
    tokenizer = load_tokenizer("mine/tokenizer.model")
    contents = [path.read_text() for path in texts.iterdir()]
    chosen = [text for text in contents if drawn(held.seed, text) < held.fraction]
    assert held_out.tokens == sum(len(ids) + 1 for ids in tokenizer.encode(chosen))
    fewer = [f"stages.{i}.tokens={stage.batch_tokens}" for i, stage in enumerate(run.stages)]
    fewer += ["stages.0.learning_rate.warmup_tokens=0", "evaluate.max_tokens=512"]
    capsys.readouterr()
    ranks = Ranks(nursery, [*shlex.split(lines[2])[1:], *fewer], 1, here)
    assert ranks.wait() == [0], ranks.text()[-2000:]
    assert Path("mine/run/ledger.jsonl").exists()
    assert "holds a run" in refused(capsys, "mine", "--data", texts)


@pytest.mark.parametrize("plan", known_names(SCHEMES))
def test_every_plan_gives_a_file_that_loads(plan: str, texts: Path) -> None:
    words = ["init", "mine", "--data", str(texts), "--plan", plan, "--lengths", "32,64"]
    assert main(words) == 0
    run = load("mine/run.yaml")
    assert [list(stage.lengths) for stage in run.stages] == [[32], [64]]
    for scheme in run.model.layer_plan.schemes.values():
        assert scheme.window is None or scheme.window == 8


def test_on_a_server_the_largest_model_that_text_and_memory_carry(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "this_machine", lambda: SERVER)
    assert main(["init", "mine", "--data", str(texts)]) == 0
    run = load("mine/run.yaml")
    assert run.precision == "bf16" and run.model.hidden_size == 128
    for stage in run.stages:
        assert stage.batch_tokens % (8 * stage.micro_batch_tokens) == 0


def test_scripts_lengths_and_documents_are_told(texts: Path) -> None:
    found = look(str(texts))
    assert found.files == found.documents == 12 and found.whole
    assert set(found.scripts) == {"Latin", "Cyrillic"}
    assert abs(sum(found.scripts.values()) - 1) < 1e-9
    assert found.bytes == sum(path.stat().st_size for path in texts.iterdir())
    assert found.longest == max(len(path.read_text()) for path in texts.iterdir())


def test_blocks_are_in_order_and_a_sign_has_its_script(tmp_path: Path) -> None:
    starts = [start for start, _ in BLOCKS]
    assert starts == sorted(set(starts))
    signs = {"Greek": "ω", "Han": "水", "Kana": "あ", "Hangul": "물", "Arabic": "م", "Thai": "น"}
    for name, sign in signs.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.txt").write_text(f"{sign} 12, 3!\n" * 20, encoding="utf-8")
        assert look(str(folder)).scripts == {name: 1.0}


def test_a_text_without_spaces_gets_room_for_its_signs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "han").mkdir()
    signs = "".join(map(chr, range(0x4E00, 0x4E00 + 3000)))
    (tmp_path / "han/a.txt").write_text(f"{signs}\n" * 10, encoding="utf-8")
    assert main(["init", "mine", "--data", "han"]) == 0
    assert load("mine/run.yaml").model.vocab_size >= 6000
    assert "held out: nothing" in capsys.readouterr().out


def test_what_cannot_be_is_one_line(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--data", texts)
    Path("empty").mkdir()
    Path("pictures").mkdir()
    Path("pictures/a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    Path("blank").mkdir()
    Path("blank/a.txt").write_text(" \n" * 50)
    Path("few").mkdir()
    Path("few/a.txt").write_text(" ".join(f"w{n}" for n in range(300)))
    Path("same").mkdir()
    Path("same/a.txt").write_text("All work and no play.\n" * 9000)
    Path("file").write_text("x")
    Path("there").mkdir()
    Path("there/run.yaml").write_text("seed: 1\n")
    assert "names no file" in refused(capsys, "mine", "--data", "empty")
    assert "left out" in refused(capsys, "mine", "--data", "pictures")
    assert "no document with text" in refused(capsys, "mine", "--data", "blank")
    assert "holds 5 different words" in refused(capsys, "mine", "--data", "same")
    assert "fewer than 16 rows of 256" in refused(capsys, "mine", "--data", "few")
    assert "does not exist" in refused(capsys, "mine", "--data", "nowhere")
    assert "is a file" in refused(capsys, "file", *data)
    assert "nothing is overwritten" in refused(capsys, "there", *data)
    Path("there/run.yaml").unlink()
    Path("there/manifest.json").write_text("{}")
    assert "holds a dataset" in refused(capsys, "there", *data)
    assert "lies in --data" in refused(capsys, "few/mine", "--data", "few")
    said = refused(capsys, "mine", *data, "--size", "8b")
    assert "a parameter in 4 epochs" in said and "Use --size tiny" in said
    assert "Did you mean 'tiny'?" in refused(capsys, "mine", *data, "--size", "tiney")
    assert "Did you mean 'rnope_swa'?" in refused(capsys, "mine", *data, "--plan", "rnope-swa")
    assert "no document" in refused(capsys, "mine", *data, "--lengths", "2k,1024k")
    assert "is no length" in refused(capsys, "mine", *data, "--lengths", "2k,much")


def test_a_machine_that_is_too_small_says_what_fits(
    texts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "this_machine", lambda: Machine("cpu", 1, 2**26, 2))
    said = refused(capsys, "mine", "--data", texts)
    assert said.startswith("megahybrid: --size=tiny takes 0.") and "0.1 GiB free" in said


def test_lengths_are_read_with_k() -> None:
    assert read_lengths("2k,8k, 32K") == (2048, 8192, 32_768)
    assert read_lengths("256") == (256,)
    for text in ("", "1k,1k", "3k,4k", "2k,1k", "0", "-1", "16m", "2k,,4k", "9" * 30):
        with pytest.raises(ConfigError, match="--lengths="):
            read_lengths(text)


def test_the_command_line_names_the_sizes_that_there_are() -> None:
    from megahybrid.cli.start import SIZES as told

    assert told == tuple(SIZES)
