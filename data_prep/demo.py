"""The data of the demos, `pkg:runs/demo.yaml` and `pkg:runs/demo_chat.yaml`: text that every
machine has and conversations of our own, tokenized."""

import shlex
from collections.abc import Callable
from pathlib import Path

from megahybrid.data_prep.job_folder import WORK

# What configs/data/demo.yaml and demo_chat.yaml name, relative to where a command is given.
FOLDER, CHATS = Path("build/demo"), Path("build/demo_chat")
PARTS = ("train", "held_out", "held_out_long")
CHAT_TOKENS = 512  # of a row, which holds some ten conversations whole


def make_demo(
    command: Callable[[list[str]], object], tell: Callable[[str], None], *, chats: bool = False
) -> None:
    """Make what is missing under build/demo by `megahybrid data` commands, in their order; an
    interrupted call, made again, goes on where it was. chats: and under build/demo_chat.

    `command` runs one, without the words `megahybrid data`; `tell` is told each before it runs.
    """
    text, model, data = FOLDER / "stdlib.jsonl", FOLDER / "tokenizer.model", FOLDER / "data"
    steps = [
        (text.exists(), ["gather-stdlib", str(text)]),
        (
            model.exists(),
            # The tokens of turns are reserved, so that the trained model can go on to chats.
            [
                *("tokenizer", str(text), "--output", str(model), "--vocab-size", "4096"),
                *("--chat", "chatml"),
            ],
        ),
        (
            _is_whole(data, PARTS),
            [
                *("tokenize", str(text), "--tokenizer", str(model), "--output", str(data)),
                *("--held-out", "0.02", "--longest", "2"),
            ],
        ),
    ]
    missing = [words for is_there, words in steps if not is_there]
    if _is_whole(data, PARTS) and model.exists():
        missing = []  # the text is needed no more
    for words in [*missing, *(_chat_steps(model) if chats else [])]:
        tell(shlex.join(["megahybrid", "data", *words]))
        command(words)
    if chats:
        tell(f"The conversations are in {CHATS}. With runs/demo trained, go on from it:")
        tell("  megahybrid train pkg:runs/demo_chat.yaml")
    else:
        tell(f"The demo's data is in {FOLDER}. Train on it: megahybrid train pkg:runs/demo.yaml")


def _chat_steps(model: Path) -> list[list[str]]:
    """The commands that make what is missing of the conversations."""
    text, data, rows = CHATS / "chats.jsonl", CHATS / "data", CHATS / f"rows_{CHAT_TOKENS}"
    whole = _is_whole(data, PARTS[:2])
    steps = [
        (text.exists() or whole, ["make-chats", str(text)]),
        (
            whole,
            [
                *("tokenize", str(text), "--chat", "messages", "--tokenizer", str(model)),
                *("--output", str(data), "--max-tokens", str(CHAT_TOKENS), "--held-out", "0.1"),
            ],
        ),
        (
            (rows / "plan.json").exists(),
            [
                *("pack", str(data / "train"), "--length", str(CHAT_TOKENS)),
                *("--output", str(rows)),
            ],
        ),
    ]
    return [words for is_there, words in steps if not is_there]


def _is_whole(data: Path, parts: tuple[str, ...]) -> bool:
    """Say whether `tokenize` has ended there: it takes its working folder away last of all."""
    return (
        all((data / part / "manifest.json").exists() for part in parts)
        and not (data / WORK).exists()
    )
