"""Puzzles over token ids that a tiny model can be trained on and scored on.

Of a range of ids the first is the question mark, the next eight are noise; what is left is halved
into keys and values.
"""

from collections.abc import Callable

import numpy as np

from megahybrid.errors import ConfigError
from megahybrid.evaluate.example import Example

NOISE = 8


class Alphabet:
    """The parts of a range of ids [first, last + 1)."""

    def __init__(self, first: int, stop: int) -> None:
        half = (stop - first - 1 - NOISE) // 2
        if half < 2:
            raise ConfigError(
                f"ids={[first, stop]} leaves {max(0, half)} keys beside {NOISE} of noise and a "
                f"question mark. Use at least {NOISE + 5} ids."
            )
        self.question_mark = first
        self.noise = np.arange(first + 1, first + 1 + NOISE)
        self.keys = np.arange(half) + first + 1 + NOISE
        self.values = self.keys + half


def recall(length: int, pairs: int, ids: Alphabet, draw: np.random.Generator) -> Example:
    """`pairs` of key and value at drawn positions in noise; then `? key value` for each key.

    Every key is asked once, in drawn order. The values asked for are what counts.
    """
    context = length - 3 * pairs
    if context < 2 * pairs or pairs > len(ids.keys):
        raise ConfigError(
            f"length={length} cannot hold pairs={pairs} and their questions ({5 * pairs} tokens, "
            f"{len(ids.keys)} keys). Use fewer pairs or longer rows."
        )
    keys = draw.choice(ids.keys, pairs, replace=False)
    values = draw.choice(ids.values, pairs)
    tokens = draw.choice(ids.noise, length)
    # Places in a text where each pair is one token, then each one shifted by those before it.
    positions = np.sort(draw.choice(context - pairs, pairs, replace=False)) + np.arange(pairs)
    tokens[positions], tokens[positions + 1] = keys, values
    order = draw.permutation(pairs)
    tokens[context::3], tokens[context + 1 :: 3] = ids.question_mark, keys[order]
    tokens[context + 2 :: 3] = values[order]
    spans = tuple((int(position), int(position) + 2) for position in positions)
    asked = tuple(range(context + 2, length, 3))
    return Example(_plain(tokens), context, context + 2, spans, asked)


def copy(length: int, pairs: int, ids: Alphabet, draw: np.random.Generator) -> Example:
    """Drawn values, the mark, the values again; first one of noise where the length is even."""
    size = (length - 1) // 2
    text = draw.choice(ids.values, size)
    front = draw.choice(ids.noise, length - 1 - 2 * size)
    tokens = np.concatenate((front, text, [ids.question_mark], text))
    return Example(
        _plain(tokens), length - size - 1, length - size, ((len(front), len(front) + size),)
    )


def induction(length: int, pairs: int, ids: Alphabet, draw: np.random.Generator) -> Example:
    """Drawn keys and values in which one key stands once, with a value behind it; then that key."""
    key, value = draw.choice(ids.keys), draw.choice(ids.values)
    others = np.concatenate((ids.keys[ids.keys != key], ids.values))
    tokens = draw.choice(others, length)
    position = int(draw.integers(length - 3))
    tokens[[position, position + 1, length - 2, length - 1]] = key, value, key, value
    return Example(_plain(tokens), length - 2, length - 1, ((position, position + 2),))


def phonebook(length: int, pairs: int, ids: Alphabet, draw: np.random.Generator) -> Example:
    """Entries of two keys (a name) and three values (a number); then the mark and one name."""
    entries = (length - 6) // 5
    names = len(ids.keys) ** 2
    if not 0 < entries <= names:
        raise ConfigError(
            f"length={length} holds {entries} entries of a phonebook ({names} names). "
            "Use a length from 11 on, or more ids."
        )
    drawn = draw.choice(names, entries, replace=False)
    book = np.empty((entries, 5), dtype=np.int64)
    book[:, 0], book[:, 1] = ids.keys[drawn // len(ids.keys)], ids.keys[drawn % len(ids.keys)]
    book[:, 2:] = draw.choice(ids.values, (entries, 3))
    front = draw.choice(ids.noise, length - 6 - 5 * entries)
    one = int(draw.integers(entries))
    tokens = np.concatenate((front, book.ravel(), [ids.question_mark], book[one]))
    start = len(front) + 5 * one
    return Example(_plain(tokens), length - 6, length - 3, ((start, start + 5),))


PUZZLES: dict[str, Callable[[int, int, Alphabet, np.random.Generator], Example]] = {
    "recall": recall,
    "copy": copy,
    "induction": induction,
    "phonebook": phonebook,
}


def _plain(tokens: np.ndarray) -> tuple[int, ...]:
    return tuple(int(token) for token in tokens)
