import json
import random
from pathlib import Path

import pytest

from megahybrid.data.tokenizer import Tokenizer, load_tokenizer
from megahybrid.data_prep.vocabulary import train_tokenizer


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents of very different lengths, one a line."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(1, 9))) for _ in range(400)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for number in range(300):
            count = int(3 * 1.5 ** draw.uniform(0, 14))
            text = f"{number}: " + " ".join(draw.choices(words, k=count)) + "\n    é"
            file.write(json.dumps({"text": text}) + "\n")
    return path


@pytest.fixture(scope="session")
def model(corpus: Path) -> Path:
    path = corpus.with_name("bpe.model")
    train_tokenizer([corpus], path, 400)
    return path


@pytest.fixture(scope="session")
def tokenizer(model: Path) -> Tokenizer:
    return load_tokenizer(model)
