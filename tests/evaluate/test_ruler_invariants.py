"""What holds of every RULER task, at any length and with any tokenizer, down to sixteen ids."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megahybrid.config import parse
from megahybrid.config.suite import RULER_TASKS, RulerTask
from megahybrid.data.manifest import TokenizerInfo
from megahybrid.errors import ConfigError
from megahybrid.evaluate.example import Example
from megahybrid.evaluate.haystack import COMMON_WORDS, Material, draw_strings, word
from megahybrid.evaluate.ruler import RulerMaker, generated_tokens, matches
from megahybrid.evaluate.suite import example_draw
from tests.evaluate.characters import VOCAB, Characters, TextAlone

EOD = 1


class Nibbles(TextAlone):
    """Two ids of sixteen for each byte: the smallest vocabulary that writes every text."""

    info = TokenizerInfo(kind="nibbles", sha256="0" * 64, vocab_size=18, eod_id=EOD)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[2 + n for b in text.encode() for n in divmod(b, 16)] for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray(ids, self.info.dtype) for ids in self.encode(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        pairs = [i - 2 for i in ids if i > 1]
        whole = [16 * high + low for high, low in zip(pairs[::2], pairs[1::2], strict=False)]
        return bytes(whole).decode(errors="replace")


class Pieces(TextAlone):
    """A few hundred ids: words of up to four letters, then single characters."""

    def __init__(self) -> None:
        self.words = [word(n)[:4] for n in range(0, COMMON_WORDS, 7)] + [
            " the",
            "VAR ",
            ". ",
            "One",
        ]
        self.words = list(dict.fromkeys(self.words))
        self.info = TokenizerInfo(
            kind="pieces", sha256="0" * 64, vocab_size=VOCAB + len(self.words), eod_id=EOD
        )
        self.known = re.compile("|".join(map(re.escape, self.words)) + "|(?s:.)")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [
            [
                VOCAB + self.words.index(piece)
                if piece in self.words
                else Characters().encode([piece])[0][0]
                for piece in self.known.findall(text)
            ]
            for text in texts
        ]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray(ids, self.info.dtype) for ids in self.encode(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        told = Characters().decode
        return "".join(self.words[i - VOCAB] if i >= VOCAB else told([i]) for i in ids)


TOKENIZERS = {"nibbles": Nibbles(), "characters": Characters(), "pieces": Pieces()}
LENGTHS = (640, 1500, 4096, 16384)


@pytest.fixture(scope="module")
def passages(tmp_path_factory: pytest.TempPathFactory) -> str:
    items = [
        {"question": f"Who made lamp {n}?", "answers": [f"Maker{n}x"], "passages": [f"Maker{n}x."]}
        for n in range(400)
    ]
    path: Path = tmp_path_factory.mktemp("ruler") / "passages.json"
    path.write_text(json.dumps(items))
    return str(path)


def maker(name: str, passages: str) -> RulerMaker:
    fields = {"kind": "ruler", "tasks": list(RULER_TASKS), "lengths": [8]}
    names = {"qa_1": passages, "qa_2": passages}
    tokenizer = TOKENIZERS[name]
    material = Material(tokenizer.info.vocab_size, tokenizer, {})
    return RulerMaker(parse(RulerTask, fields | {"passages": names}), material)


def made(made_by: RulerMaker, task: str, length: int, trial: int = 0) -> Example | None:
    try:
        return made_by.make(task, length, example_draw(5, task, length, trial))
    except ConfigError as error:
        assert f"lengths={length} is too short" in str(error) and "\n" not in str(error)
        return None


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("task", RULER_TASKS)
def test_any_length_is_met_or_refused_and_the_answer_is_in_the_text_and_counts(
    task: str, name: str, passages: str
) -> None:
    made_by, tokenizer = maker(name, passages), TOKENIZERS[name]
    fitted = []
    for length in LENGTHS:
        one = made(made_by, task, length)
        if one is None:
            continue
        fitted.append(length)
        assert len(one.prompt) + generated_tokens(task, length) <= length
        assert all(1 < token < tokenizer.info.vocab_size for token in one.tokens)
        prompt = tokenizer.decode(one.prompt)
        assert one.references and all(reference in prompt for reference in one.references)
        assert matches(task, one.references, tokenizer.decode(one.expected)) == 1
        # A right answer is not found in the question alone, nor one reference in another.
        asked = tokenizer.decode(one.tokens[one.question : one.answer])
        assert not any(reference in asked for reference in one.references)
        for reference in one.references:
            assert sum(reference in other for other in one.references) == 1
        again = made(made_by, task, length)
        assert again is not None and again.tokens == one.tokens
        other = made(made_by, task, length, 1)
        assert other is not None and other.tokens != one.tokens
    # What fits at a length fits at every longer one, and long ones always.
    assert fitted == list(LENGTHS[LENGTHS.index(fitted[0]) :])


@pytest.mark.parametrize("task", ["niah_multikey_1", "niah_multikey_2", "niah_multiquery"])
def test_one_needle_alone_answers_for_each_key(task: str, passages: str) -> None:
    one = made(maker("characters", passages), task, 8192)
    assert one is not None
    prompt = Characters().decode(one.prompt)
    said = re.findall(r"numbers for (\S+) is: (\d+)\.", prompt)
    asked = re.search(r"magic numbers for (.+)\? They", prompt)
    assert asked is not None
    for key, value in zip(asked[1].split(", "), one.references, strict=True):
        assert {v for k, v in said if k == key} == {value}
    # As many keys as the task has, and no key a part of another.
    keys = {key for key, _ in said}
    assert len(keys) > 20 if task == "niah_multikey_2" else len(keys) == 4
    assert not any(one in other for one in keys for other in keys if one != other)


@pytest.mark.parametrize("length", [1500, 6000, 24000])
def test_common_words_stay_the_ten_most_common_and_no_word_hides_in_another(
    length: int, passages: str
) -> None:
    one = made(maker("characters", passages), "cwe", length)
    assert one is not None
    listed = re.findall(r"\d+\. (\S+)", Characters().decode(one.prompt))
    counted = Counter(listed)
    often, seldom = counted.most_common(11)[9][1], counted.most_common(11)[10][1]
    assert {w for w, n in counted.items() if n == often} == set(one.references)
    assert len(one.references) == 10 and often > seldom
    assert {n for w, n in counted.items() if w not in one.references} == {seldom}
    for reference in one.references:
        assert not any(reference in w for w in counted if w != reference)


@pytest.mark.parametrize("length", [1500, 6000, 24000])
def test_coded_words_fall_off_as_a_power_and_three_stand_out(length: int, passages: str) -> None:
    one = made(maker("characters", passages), "fwe", length)
    assert one is not None
    words = re.findall(r"\b[a-z]{6}\b", Characters().decode(one.tokens[: one.question]))
    counted = Counter(w for w in words if w not in ("coded", "frequent"))
    ranked = [n for w, n in counted.most_common() if n > 0]
    assert [w for w, _ in counted.most_common(3)] == list(one.references)
    assert ranked[0] > ranked[1] > ranked[2] > ranked[3]
    if length >= 6000:
        for rank in (2, 3, 4):
            assert ranked[rank - 1] / ranked[0] == pytest.approx(rank**-2.0, abs=0.03)


@pytest.mark.parametrize("length", [1500, 6000, 24000])
def test_a_chain_of_variables_has_five_links_in_order_of_the_text(
    length: int, passages: str
) -> None:
    for trial in range(3):
        one = made(maker("characters", passages), "vt", length, trial)
        assert one is not None
        text = Characters().decode(one.tokens[: one.question])
        links = re.findall(r"VAR ([A-Z]{5}) = (?:VAR ([A-Z]{5})|(\d{5}))\.", text)
        assert len(links) == 5 and [name for name, _, _ in links] == list(one.references)
        assert links[0][2] and all(here[1] == before[0] for before, here in pairwise(links))
        assert len(set(one.references)) == 5


def test_depths_cover_the_whole_text(passages: str) -> None:
    made_by = maker("characters", passages)
    found = [made(made_by, "niah_single_1", 2000, trial) for trial in range(40)]
    shares = [one.needles[0][0] / one.question for one in found if one is not None]
    assert min(shares) < 0.1 and max(shares) > 0.85 and 0.35 < np.mean(shares) < 0.65


def test_the_gold_passages_of_a_question_are_among_others_once(passages: str) -> None:
    one = made(maker("characters", passages), "qa_1", 3000)
    assert one is not None
    listed = re.findall(r"Document (\d+): (\S+)", Characters().decode(one.prompt))
    texts = [text for _, text in listed]
    assert [int(n) for n, _ in listed] == list(range(1, len(listed) + 1))
    assert texts.count(f"{one.references[0]}.") == 1
    assert len(set(texts)) == len(texts) > 20


def test_rows_longer_than_all_passages_are_filled_from_essays(passages: str) -> None:
    for length in (12_000, 30_000):
        one = made(maker("characters", passages), "qa_2", length)
        assert one is not None
        assert 0.97 * length < len(one.prompt) + generated_tokens("qa_2", length) <= length
        text = Characters().decode(one.prompt)
        assert text.count(f"{one.references[0]}.") == 1 and "The sky is blue." in text


def test_words_are_endless_and_none_is_part_of_another() -> None:
    words = [word(n) for n in range(4 * COMMON_WORDS)]
    joined = " ".join(words)
    assert all(joined.count(one) == 1 for one in words)
    many = draw_strings("words", 2 * COMMON_WORDS, np.random.default_rng(0))
    assert len(set(many)) == len(many)


def test_answers_that_a_tokenizer_cannot_write_are_refused(passages: str) -> None:
    class NoDigits(Characters):
        def encode(self, texts: Sequence[str]) -> list[list[int]]:
            return super().encode([re.sub(r"\d", "?", text) for text in texts])

    fields = {"kind": "ruler", "tasks": ["niah_single_1", "vt"], "lengths": [8]}
    made_by = RulerMaker(parse(RulerTask, fields), Material(VOCAB, NoDigits(), {}))
    with pytest.raises(ConfigError, match=r"cannot encode '\d{7}' \(it decodes to '\?{7}'\)"):
        made_by.make("niah_single_1", 1500, example_draw(1, "x"))
    assert made_by.make("vt", 1500, example_draw(1, "x")).references  # its names have no digits
