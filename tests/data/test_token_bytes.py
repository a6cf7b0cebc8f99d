"""The bytes that a tokenizer's ids stand for sum to those of any text."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megahybrid.data.token_bytes import token_bytes
from megahybrid.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

TEXTS = ["def read(self, size):\n    return 12 + 34  # größer €\n" * 30, "naïve café 漢字 😀 " * 30]


def sentencepiece(path: Path) -> Tokenizer:
    path.write_bytes(train_sentencepiece(TEXTS, vocab_size=340, special_tokens=["<|é|>"]))
    return load_tokenizer(path)


def byte_level(path: Path) -> Tokenizer:
    backend = pytest.importorskip("tokenizers")
    tokenizer = backend.Tokenizer(backend.models.BPE())
    tokenizer.pre_tokenizer = backend.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = backend.decoders.ByteLevel()
    trainer = backend.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=backend.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens(["né"])
    tokenizer.save(str(path))
    return load_tokenizer(path)


@pytest.mark.parametrize(
    ("make", "name"), [(sentencepiece, "a.model"), (byte_level, "tokenizer.json")]
)
def test_ids_of_a_text_stand_for_its_bytes(make, name: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    tokenizer = make(tmp_path / name)
    sizes = token_bytes(tokenizer)
    assert sizes is not None and sizes.shape == (tokenizer.info.vocab_size,)
    assert sizes[tokenizer.info.eod_id] == 0

    @settings(max_examples=60, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
    def whole(text: str) -> None:
        (ids,) = tokenizer.encode([text])
        assert sizes[ids].sum() == len(text.encode())

    whole()
    for text in (*TEXTS, "né <|é|> é"):
        assert sizes[tokenizer.encode([text])[0]].sum() == len(text.encode())


def test_word_pieces_do_not_tell(tmp_path: Path) -> None:
    backend = pytest.importorskip("tokenizers")
    words = backend.models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "</s>": 3}, unk_token="[UNK]")
    tokenizer = backend.Tokenizer(words)
    tokenizer.decoder = backend.decoders.WordPiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert token_bytes(load_tokenizer(tmp_path / "tokenizer.json")) is None
