"""Texts in which needles are hidden, and what keys and values are drawn from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from uuid import UUID

import numpy as np

from megahybrid.config.suite import HeldOutHaystack, NoiseHaystack, TextHaystack
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.tokenizer import Tokenizer
from megahybrid.errors import ConfigError, DataError
from megahybrid.plain_file import read_plain_file

# Hay of a number of tokens, and the places in it where a sentence may be put (None: anywhere).
Hay = Callable[[int, np.random.Generator], tuple[list[int], list[int] | None]]

FIRST = (
    *("amber", "brave", "calm", "daring", "early", "fierce", "gentle", "happy"),
    *("icy", "jolly", "keen", "lively", "misty", "noble", "odd"),
)
LAST = (
    *("anchor", "bridge", "candle", "desert", "engine", "forest"),
    *("garden", "harbor", "island", "jacket", "kettle", "lantern"),
)
COMMON_WORDS = len(FIRST) * len(LAST)


def word(number: int) -> str:
    """The word of a number, from 0 on, endlessly: amber-anchor, …, amber1-anchor, …

    None is part of another: answers are looked for in generated text.
    """
    again, place = divmod(number, COMMON_WORDS)
    first, last = divmod(place, len(LAST))
    return f"{FIRST[first]}{again or ''}-{LAST[last]}"


@dataclass(frozen=True)
class Material:
    """The material of a suite: a tokenizer, if there is one, and the run's held-out sets."""

    vocab_size: int
    tokenizer: Tokenizer | None
    held_out: dict[str, TokenDataset]

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Raises ConfigError where there is no tokenizer."""
        if self.tokenizer is None:
            raise ConfigError(
                "data.tokenizer=null: needles are text and need one. Name its file with "
                "--tokenizer, or ask for recall, copy, induction or phonebook."
            )
        return self.tokenizer.encode([text])[0]

    def check_written(self, answers: Sequence[str]) -> None:
        """Raise ConfigError for an answer that the tokenizer cannot write.

        Scores of it would say nothing.
        """
        if self.tokenizer is None:
            return
        for answer in answers:
            found = self.tokenizer.decode(self.encode(" " + answer)).strip()
            if found.lower() != answer.strip().lower():
                raise ConfigError(
                    f"the tokenizer cannot encode {answer!r} (it decodes to {found!r}). Ask for "
                    "keys and values that it knows."
                )


def make_hay(source: HeldOutHaystack | TextHaystack | NoiseHaystack, material: Material) -> Hay:
    """The hay that a suite names. Raises DataError where it is missing or empty."""
    if isinstance(source, NoiseHaystack):
        unit = material.encode(source.text)
        return lambda count, draw: (
            (unit * (count // len(unit) + 1))[:count],
            [*range(0, count, len(unit)), count],
        )
    if isinstance(source, TextHaystack):
        try:
            ids = material.encode(read_plain_file(source.path).decode("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"haystack.path={source.path} cannot be read ({error}).") from None
        return _endless(ids, source.path)
    sets = material.held_out
    if not sets:
        raise DataError(
            "haystack.kind=held_out: this run has no held-out set (data.held_out names 0). Name "
            "one there, or a dataset with --data."
        )
    if source.set is not None and source.set not in sets:
        raise DataError(
            f"haystack.set={source.set} is not a held-out set of this run "
            f"({', '.join(sets)}). Name one of data.held_out, or a dataset with --data NAME=DIR."
        )
    name = source.set or next(iter(sets))
    return _endless(_joined(sets[name]), name)


def _joined(dataset: TokenDataset, most: int = 2_000_000) -> list[int]:
    """The documents' tokens without what ends them: a needle must be in the question's document."""
    tokens = np.asarray(dataset.read(0, min(most, dataset.tokens)), dtype=np.int64)
    if dataset.eod_id is not None:
        tokens = tokens[tokens != dataset.eod_id]
    return tokens.tolist()


def _endless(ids: Sequence[int], name: str) -> Hay:
    if not ids:
        raise DataError(f"haystack {name} is empty (0 tokens). Give it some text.")

    def hay(count: int, draw: np.random.Generator) -> tuple[list[int], None]:
        start = int(draw.integers(len(ids)))
        found = list(ids[start : start + count])
        while len(found) < count:
            found += ids[: count - len(found)]
        return found, None

    return hay


def draw_strings(kind: str | list[str], count: int, draw: np.random.Generator) -> list[str]:
    """`count` different strings: words, seven-digit numbers, UUIDs, or of a list."""
    if kind == "numbers":
        return [str(n) for n in 1_000_000 + draw.choice(9_000_000, count, replace=False)]
    if kind == "uuids":
        return [str(UUID(bytes=draw.bytes(16), version=4)) for _ in range(count)]
    if kind == "words":
        return [word(int(n)) for n in draw.permutation(max(count, COMMON_WORDS))[:count]]
    known = list(kind)
    if count > len(known):
        raise ConfigError(
            f"{count} different strings are needed but the list has {len(known)}. Add some, or use "
            "fewer needles."
        )
    return [known[n] for n in draw.choice(len(known), count, replace=False)]
