"""Puzzles can be solved from what is in them, and have the lengths asked."""

import numpy as np
import pytest

from megahybrid.errors import ConfigError
from megahybrid.evaluate.synthetic import Alphabet, copy, induction, phonebook, recall

IDS = Alphabet(3, 60)


def draws(count: int = 30) -> list[np.random.Generator]:
    return [np.random.default_rng(n) for n in range(count)]


@pytest.mark.parametrize(("length", "pairs"), [(16, 2), (24, 3), (32, 4), (512, 4)])
def test_recall_asks_every_key_once_and_the_value_stands_behind_it(length: int, pairs: int) -> None:
    for draw in draws():
        one = recall(length, pairs, IDS, draw)
        assert len(one.tokens) == length and len(one.counted) == pairs
        context = one.tokens[: one.question]
        asked = []
        for place in one.counted:
            mark, key, value = one.tokens[place - 2 : place + 1]
            assert mark == IDS.question_mark and context.count(key) == 1
            assert context[context.index(key) + 1] == value
            asked.append(key)
        assert len(set(asked)) == pairs
        assert sorted(context[start] for start, _ in one.needles) == sorted(asked)


@pytest.mark.parametrize("length", [8, 9, 31])
def test_copy_says_the_sequence_again(length: int) -> None:
    for draw in draws(5):
        one = copy(length, 0, IDS, draw)
        (start, stop) = one.needles[0]
        assert len(one.tokens) == length and one.expected == one.tokens[start:stop]


def test_induction_has_its_key_once_before_the_end() -> None:
    for draw in draws():
        one = induction(20, 0, IDS, draw)
        key = one.tokens[-2]
        assert len(one.tokens) == 20 and one.tokens[:-2].count(key) == 1
        assert one.tokens[one.tokens.index(key) + 1] == one.expected[0]


@pytest.mark.parametrize("length", [11, 40, 300])
def test_phonebook_has_each_name_once(length: int) -> None:
    for draw in draws(5):
        one = phonebook(length, 0, IDS, draw)
        start = one.needles[0][0]
        assert len(one.tokens) == length
        assert one.tokens[start : start + 5] == one.tokens[-5:]
        book = one.tokens[(length - 6) % 5 : one.question]
        names = [book[n : n + 2] for n in range(0, len(book), 5)]
        assert len(set(names)) == len(names)


def test_puzzles_that_do_not_fit_are_refused() -> None:
    draw = np.random.default_rng(0)
    with pytest.raises(ConfigError, match="length=10 cannot hold pairs=4"):
        recall(10, 4, IDS, draw)
    with pytest.raises(ConfigError, match="Use at least 13 ids"):
        Alphabet(0, 12)
    with pytest.raises(ConfigError, match="length=10 holds 0 entries"):
        phonebook(10, 0, IDS, draw)
