"""The data of the demo, `pkg:runs/demo.yaml`: text that every machine has, tokenized."""

import shlex
from collections.abc import Callable
from pathlib import Path

from megahybrid.data_prep.job_folder import WORK

# What configs/data/demo.yaml names, relative to where a command is given.
FOLDER = Path("build/demo")
PARTS = ("train", "held_out", "held_out_long")


def make_demo(command: Callable[[list[str]], object], tell: Callable[[str], None]) -> None:
    """Make what is missing under build/demo by `megahybrid data` commands, in their order; an
    interrupted call, made again, goes on where it was.

    `command` runs one, without the words `megahybrid data`; `tell` is told each before it runs.
    """
    text, model, data = FOLDER / "stdlib.jsonl", FOLDER / "tokenizer.model", FOLDER / "data"
    steps = [
        (text.exists(), ["gather-stdlib", str(text)]),
        (model.exists(), ["tokenizer", str(text), "--output", str(model), "--vocab-size", "4096"]),
        (
            _is_whole(data),
            [
                *("tokenize", str(text), "--tokenizer", str(model), "--output", str(data)),
                *("--held-out", "0.02", "--longest", "2"),
            ],
        ),
    ]
    missing = [words for is_there, words in steps if not is_there]
    if _is_whole(data) and model.exists():
        missing = []  # the text is needed no more
    for words in missing:
        tell(shlex.join(["megahybrid", "data", *words]))
        command(words)
    tell(f"The demo's data is in {FOLDER}. Train on it: megahybrid train pkg:runs/demo.yaml")


def _is_whole(data: Path) -> bool:
    """Say whether `tokenize` has ended there: it takes its working folder away last of all."""
    parts = all((data / part / "manifest.json").exists() for part in PARTS)
    return parts and not (data / WORK).exists()
