"""The package as a library: its front is light, typed, and does what the commands do."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import megahybrid
from megahybrid import api, cli
from megahybrid.config import RunConfig
from megahybrid.data.token_writer import TokenWriter
from megahybrid.errors import ConfigError, DataError
from tests.start.texts import write_texts
from tests.test_command_line import imported, python
from tests.train.text_run import RUN

FOLDERS_TOO = ("train", "evaluate")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file whose run was trained by the front's own function: two steps."""
    from megahybrid.data.tokenizer import load_tokenizer
    from megahybrid.data_prep.vocabulary import train_tokenizer

    folder = tmp_path_factory.mktemp("api")
    texts = write_texts(folder / "texts", documents=4, words=400)
    train_tokenizer([texts], folder / "words.model", 310)
    tokenizer = load_tokenizer(folder / "words.model")
    for name in ("text", "unseen"):
        with TokenWriter(folder / name, tokenizer.info) as writer:
            for path in sorted(texts.iterdir()):
                writer.add(tokenizer.encode([path.read_text()])[0])
    (folder / "run.yaml").write_text(RUN.format(folder=folder) + f"directory: {folder}/run\n")
    fewer = [f"stages.{index}.tokens=512" for index in (0, 1)]
    assert megahybrid.train(folder / "run.yaml", *fewer, "parallel.tensor=1") == folder / "run"
    return folder


def test_the_import_is_quick_and_light_and_so_is_the_api() -> None:
    assert imported("import megahybrid; megahybrid.load_run; megahybrid.train") == set()
    empty = min(python("-c", "pass")[1] for _ in range(3))
    assert min(python("-c", "import megahybrid")[1] for _ in range(3)) - empty < 0.15


@pytest.mark.parametrize("name", megahybrid.__all__)
def test_everything_in_front_is_documented_and_typed(name: str) -> None:
    value = getattr(megahybrid, name)
    assert name in dir(megahybrid)
    value = getattr(api, name) if name in FOLDERS_TOO else value
    assert inspect.getdoc(value)
    function = value.__init__ if inspect.isclass(value) else value
    notes = {n: p.annotation for n, p in inspect.signature(function).parameters.items()}
    assert inspect.Parameter.empty not in {n: a for n, a in notes.items() if n != "self"}.values()


def test_what_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        megahybrid.trian  # noqa: B018


def test_a_function_is_called_whether_its_folder_is_imported_or_not() -> None:
    code = (
        "import megahybrid\n"
        "before = megahybrid.train, megahybrid.evaluate\n"
        "import megahybrid.train.state, megahybrid.evaluate.example\n"
        "for call in (*before, megahybrid.train, megahybrid.evaluate):\n"
        "    try:\n"
        "        call()\n"
        "    except TypeError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and lines[:2] == lines[2:] and "required positional" in lines[0]


def test_load_run_checks(trained: Path) -> None:
    run = megahybrid.load_run(trained / "run.yaml", "seed=5")
    assert isinstance(run, RunConfig) and run.seed == 5
    with pytest.raises(ConfigError, match=r"does not divide model.num_heads"):
        megahybrid.load_run(trained / "run.yaml", "parallel.tensor=3")
    with pytest.raises(ConfigError, match="world"):
        megahybrid.load_run(trained / "run.yaml", world_size=3)


def test_train_raises_what_the_command_says(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"^seed=7 is not what the run in .* was started with"):
        megahybrid.train(trained / "run.yaml", "parallel.tensor=1", "seed=7")
    assert "seed=7" in capsys.readouterr().err


def test_a_model_writes_and_is_scored_as_the_commands_do(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = megahybrid.load_model(trained / "run", device="cpu")
    assert model.step == 2 and next(model.model.parameters()).device.type == "cpu"
    text = megahybrid.generate(model, "abc def", tokens=5, seed=3)
    words = ["--prompt", "abc def", "--tokens", "5", "--seed", "3", "--device", "cpu"]
    assert cli.main(["sample", str(trained / "run"), *words]) == 0
    assert capsys.readouterr().out == f"{text}\n" and text.startswith("abc def")
    found = megahybrid.evaluate(model, max_tokens=512)
    options = ["--max-tokens", "512", "--device", "cpu", "--json"]
    assert cli.main(["evaluate", str(trained / "run"), *options]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found))
    again = megahybrid.evaluate(model, data={"own": trained / "unseen"}, max_tokens=512)
    assert [score["set"] for score in again["scores"]] == ["own", "own"]
    assert again["scores"][0]["loss"] == found["scores"][0]["loss"]
    with pytest.raises(ConfigError, match="--prompt is empty"):
        megahybrid.generate(model, "")


def test_an_analysis_is_the_commands_and_is_drawn(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = megahybrid.load_model(trained / "run", device="cpu")
    found = megahybrid.analyse(model, length=200, trials=1, data=trained / "unseen")
    options = ["--length", "200", "--trials", "1", "--data", str(trained / "unseen")]
    assert cli.main(["analyse", str(trained / "run"), *options, "--device", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told | {"seconds": 0} == json.loads(json.dumps(found | {"seconds": 0}))
    picture = megahybrid.draw_heads(found)
    assert picture.save(tmp_path / "heads.png").read_bytes() == picture._repr_png_()
    assert picture.png.startswith(b"\x89PNG") and "PNG" not in repr(picture)
    for wrong in ({"depth": 2.0}, {"trials": 0}, {"length": 7}):
        with pytest.raises(ConfigError, match=f"--{next(iter(wrong))}="):
            megahybrid.analyse(model, **wrong)


def test_texts_become_the_tokens_that_the_commands_make(trained: Path, tmp_path: Path) -> None:
    texts, words = trained / "texts", tmp_path / "words.model"
    tokenizer = megahybrid.train_tokenizer(texts, words, vocab_size=310)
    assert words.read_bytes() == (trained / "words.model").read_bytes()
    data = megahybrid.tokenize([texts], words, tmp_path / "data", held_out=0.3, seed=2)
    command = ["data", "tokenize", str(texts), "--tokenizer", str(words), "--held-out", "0.3"]
    assert cli.main([*command, "--seed", "2", "--output", str(tmp_path / "same")]) == 0
    for part in ("train", "held_out"):
        (ours,), (theirs,) = ((one / part).glob("*.bin") for one in (data, tmp_path / "same"))
        assert ours.read_bytes() == theirs.read_bytes()
        assert megahybrid.TokenDataset(data / part).vocab_size == tokenizer.vocab_size
    with pytest.raises(DataError):
        megahybrid.tokenize(tmp_path / "nowhere", words, tmp_path / "none")


def test_tokens_and_their_names(trained: Path) -> None:
    tokenizer = megahybrid.Tokenizer(trained / "words.model")
    ids = tokenizer.encode("abc def", eod=True)
    assert ids[-1] == tokenizer.eod_id and tokenizer.decode(ids) == "abc def"
    assert tokenizer.encode_batch(["abc def"]) == [ids[:-1]]
    assert tokenizer.token_id("</s>") == tokenizer.eod_id < tokenizer.vocab_size
    with pytest.raises(DataError, match=r"has no token '<\|im_end\|>'"):
        tokenizer.token_id("<|im_end|>")
    assert megahybrid.TokenDataset(trained / "text").documents == 4


def test_export_gives_its_folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it writes is held to transformers in tests/interop."""
    given: dict[str, object] = {}

    def write(path: Path, out: Path, **options: object) -> int:
        given.update(path=path, out=out, **options)
        return 0

    import megahybrid.interop.export as module

    monkeypatch.setattr(module, "export", write)
    assert megahybrid.export(str(trained / "run"), "out", dtype="bf16") == Path("out")
    assert given["path"] == trained / "run" and given["dtype"] == "bf16"
