"""The data that a study trains on: commands that prepare it, and documents drawn for it."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megahybrid.config.study import NeedleDocuments, Puzzles, Study
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.manifest import MANIFEST_NAME, TokenizerInfo, write_durably
from megahybrid.data.token_writer import TokenWriter
from megahybrid.data.tokenizer import load_tokenizer
from megahybrid.errors import EXIT_DONE, ConfigError
from megahybrid.evaluate.example import Example
from megahybrid.evaluate.haystack import Material
from megahybrid.evaluate.needle import NeedleMaker
from megahybrid.evaluate.suite import example_draw
from megahybrid.evaluate.synthetic import PUZZLES, Alphabet

EOD = 1  # of puzzles; their ids begin behind it


def prepare(plan: Study, out: Path) -> None:
    """Run each command of `prepare` once, then draw what is missing of `data`.

    What a kill interrupted is done again. Raises MegahybridError for what a command refuses.
    """
    done = out / "data" / "prepared"
    already = int(done.read_text()) if done.exists() else 0
    for number, line in enumerate(plan.prepare[already:], already + 1):
        arguments = [word.replace("{out}", str(out)) for word in shlex.split(line)]
        print(f"{' '.join(arguments)}", flush=True)
        if "--output" in arguments and Path(arguments[arguments.index("--output") + 1]).is_dir():
            # Left by a command that was interrupted.
            shutil.rmtree(arguments[arguments.index("--output") + 1])
        done.parent.mkdir(parents=True, exist_ok=True)
        if subprocess.run([sys.executable, "-m", "megahybrid", *arguments]).returncode != EXIT_DONE:
            raise ConfigError(f"prepare={line!r} was refused (see above). Correct it.")
        write_durably(done, str(number).encode())
    for name, documents in plan.data.items():
        folder = out / "data" / name
        if not (folder / MANIFEST_NAME).exists():
            shutil.rmtree(folder, ignore_errors=True)  # left by a draw that was interrupted
            _draw(folder, documents, plan.ids, out)


def _draw(folder: Path, documents: Puzzles | NeedleDocuments, ids: list[int], out: Path) -> None:
    print(f"drawing {documents.rows:,} documents: {folder.name}", flush=True)
    if isinstance(documents, Puzzles):
        info = TokenizerInfo(kind="puzzles", sha256="0" * 64, vocab_size=ids[1], eod_id=EOD)
        examples = _puzzles(documents, ids)
    else:
        info, examples = _needles(documents, out)
    with TokenWriter(folder, info, command="megahybrid study") as writer:
        for one in examples:
            counts = np.zeros(len(one.tokens), bool)
            counts[list(one.counted)] = True
            writer.add(one.tokens, counts if documents.targets == "answers" else None)


def _puzzles(documents: Puzzles, ids: list[int]) -> Iterator[Example]:
    alphabet = Alphabet(*ids)
    draw = example_draw(documents.seed, "study", documents.kind, documents.length)
    for _ in range(documents.rows):
        yield PUZZLES[documents.kind](documents.length, documents.pairs, alphabet, draw)


def _needles(documents: NeedleDocuments, out: Path) -> tuple[TokenizerInfo, Iterator[Example]]:
    tokenizer = load_tokenizer(documents.tokenizer.replace("{out}", str(out)))
    hay = {"hay": TokenDataset(documents.hay.replace("{out}", str(out)))} if documents.hay else {}
    maker = NeedleMaker(documents.task, Material(tokenizer.info.vocab_size, tokenizer, hay))

    def made() -> Iterator[Example]:
        draw = example_draw(documents.seed, "study", "needles")
        for _ in range(documents.rows):
            length = int(draw.choice(documents.task.lengths))
            yield maker.make(length - 1, float(draw.random()), draw)  # eod follows

    return tokenizer.info, made()
