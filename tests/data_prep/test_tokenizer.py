import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.vocabulary import train_tokenizer
from megahybrid.data.tokenizer import Tokenizer, load_tokenizer
from megahybrid.errors import DataError

# U+2581 is sentencepiece's own mark for a space, and comes back as one.
texts = st.text(st.characters(codec="utf-8", exclude_characters="\u2581\0"), max_size=60)


@settings(max_examples=50)
@given(st.lists(texts, max_size=5))
def test_any_text_survives(tokenizer: Tokenizer, given_texts: list[str]) -> None:
    ids = tokenizer.encode(given_texts)
    assert [tokenizer.decode(item) for item in ids] == given_texts
    assert all(0 < token < tokenizer.info.vocab_size for item in ids for token in item)


@pytest.mark.parametrize("text", ["</s>", "a</s><unk>b", "<s>"])
def test_text_that_spells_a_special_token_is_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.info.eod_id not in tokenizer.encode([text])[0]
    assert tokenizer.decode(tokenizer.encode([text])[0]) == text


def test_training_gives_the_same_bytes_again(corpus: Path, model: Path, tmp_path: Path) -> None:
    train_tokenizer([corpus], tmp_path / "again.model", 400)
    assert (tmp_path / "again.model").read_bytes() == model.read_bytes()


def test_unigram_can_be_trained_with_special_tokens(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "u.model"
    info = train_tokenizer([corpus], path, 400, kind="unigram", special_tokens=["<|tool|>"])
    assert info.vocab_size == 400
    assert len(load_tokenizer(path).encode(["<|tool|>"])[0]) == 1


def test_vocabulary_that_the_text_cannot_fill_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="vocab_size=60000 cannot be trained on these texts"):
        train_tokenizer([corpus], tmp_path / "a.model", 60_000)


def test_hugging_face_file_is_read_without_its_special_tokens(tmp_path: Path) -> None:
    path = write_hugging_face(tmp_path)
    tokenizer = load_tokenizer(path)
    assert tokenizer.info.kind == "huggingface"
    assert tokenizer.info.vocab_size == 258
    text = "a<|endoftext|>b é\n"
    (ids,) = tokenizer.encode([text])
    assert tokenizer.info.eod_id not in ids and tokenizer.decode(ids) == text
    assert load_tokenizer(path, "<pad>").info.eod_id != tokenizer.info.eod_id
    assert load_tokenizer(tmp_path).info == tokenizer.info
    with pytest.raises(DataError, match="has no token <no>. Name its eod"):
        load_tokenizer(path, "<no>")


def write_hugging_face(folder: Path) -> Path:
    """Bytes as tokens, then two special ones."""
    backend = pytest.importorskip("tokenizers")
    letters = backend.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: index for index, letter in enumerate(sorted(letters))}
    tokenizer = backend.Tokenizer(backend.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = backend.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = backend.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<pad>"])
    tokenizer.enable_truncation(3)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    assert json.loads(path.read_text())["truncation"]
    return path


@pytest.mark.parametrize("name", ["a.model", "tokenizer.json"])
def test_damaged_or_missing_tokenizer_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(tmp_path / name)
    (tmp_path / name).write_bytes(b"\x01\x02nonsense")
    with pytest.raises(DataError, match="damaged"):
        load_tokenizer(tmp_path / name)
