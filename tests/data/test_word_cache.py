"""Ids found word by word are those of the whole text, for every tokenizer that is cut."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megahybrid.data import word_cache
from megahybrid.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

CORPUS = [
    "the cat sat on the mat.\n\nAnd  the dog's\tbowl: 3.14, 2,000!\n    return x\n",
    "日本語のテキスト 中文 文本。 العربية نص кириллица e\u0301a  ",
] * 40
# What the splits of the libraries tell apart, and what Python tells apart otherwise than they.
ALPHABET = "ab.'’s,!1\n\r\t  \x0b\x1c\x1f\x85\xa0\u2581\u200b\u2028\u3000éß語نَ\u0301😀<|>"
ASCII = [chr(code) for code in range(128)]
a_text = st.text(st.sampled_from(ALPHABET), max_size=40) | st.text(st.sampled_from(ASCII))
texts = st.lists(a_text, max_size=4)


def sentencepiece(folder: Path, kind: Any) -> Tokenizer:
    path = folder / f"{kind}.model"
    path.write_bytes(
        train_sentencepiece(
            CORPUS, vocab_size=317 if kind == "unigram" else 340, kind=kind, special_tokens=["<|>"]
        )
    )
    return load_tokenizer(path)


def hugging_face(folder: Path, name: str, **more: Any) -> Tokenizer:
    backend = pytest.importorskip("tokenizers")
    pre = backend.pre_tokenizers
    tokenizer = backend.Tokenizer(backend.models.BPE())
    byte_level = pre.ByteLevel(add_prefix_space=more.get("prefix", False))
    if "split" in more:
        split = pre.Split(backend.Regex(more["split"]), "isolated")
        byte_level = pre.Sequence([split, pre.ByteLevel(False, use_regex=False)])
    tokenizer.pre_tokenizer = byte_level
    if "normalizer" in more:
        tokenizer.normalizer = backend.normalizers.Sequence([backend.normalizers.Lowercase()])
    trainer = backend.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(more.get("added", []))
    path = folder / f"{name}.json"
    tokenizer.save(str(path))
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    """Every kind of tokenizer whose texts are cut."""
    folder = tmp_path_factory.mktemp("words")
    found = [sentencepiece(folder, "bpe"), hugging_face(folder, "gpt2", added=["<|>"])]
    for number, split in enumerate(sorted(word_cache.KNOWN_SPLITS)):
        more = {"added": ["<|>", "|.", "1!"]} if number % 2 else {}
        found.append(hugging_face(folder, f"split{number}", split=split, **more))
    return found


@settings(max_examples=200, deadline=None)
@given(given_texts=texts)
def test_words_give_the_ids_of_the_whole(cut: list[Any], given_texts: list[str]) -> None:
    for tokenizer in cut:
        assert tokenizer._word_cache is not None
        for ids, expected in zip(
            tokenizer.encode_arrays(given_texts), tokenizer.encode(given_texts), strict=True
        ):
            assert ids.tolist() == expected and ids.dtype == np.dtype(tokenizer.info.dtype)


def test_tokenizers_that_reach_across_words_are_not_cut(tmp_path: Path) -> None:
    whole: list[Any] = [
        sentencepiece(tmp_path, "unigram"),
        hugging_face(tmp_path, "prefix", prefix=True),
        hugging_face(tmp_path, "lower", normalizer=True),
        hugging_face(tmp_path, "phrases", added=["the cat"]),
        hugging_face(tmp_path, "own", split=r"\w+ \w+|\s+"),
    ]
    for tokenizer in whole:
        assert tokenizer._word_cache is None
        assert tokenizer.encode_arrays(CORPUS[:2])[0].tolist() == tokenizer.encode(CORPUS[:1])[0]


def test_a_piece_with_a_space_inside_forbids_the_cut(tmp_path: Path, cut: list[Any]) -> None:
    raw = train_sentencepiece(CORPUS, vocab_size=340)
    assert word_cache.sentencepiece_splits(raw, ["▁the", "a"]) is not None
    assert word_cache.sentencepiece_splits(raw, ["▁the▁cat"]) is None


def test_words_kept_are_bounded(monkeypatch: pytest.MonkeyPatch, cut: list[Any]) -> None:
    monkeypatch.setattr(word_cache, "MOST_WORDS", 5)
    for tokenizer in (cut[0], cut[2]):
        cache = tokenizer._word_cache
        assert (cache._find_words is None) == (tokenizer is cut[0])
        for text in ("a b c d", "e f g h", "x" * 65, "a b c d"):
            assert cache.encode([text])[0].tolist() == tokenizer.encode([text])[0]
            for kept in (cache._pieces, cache._words):
                assert len(kept) <= 5 and "x" * 65 not in kept
