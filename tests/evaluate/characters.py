"""A tokenizer of characters, and material made with it."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from megahybrid.data.manifest import TokenizerInfo
from megahybrid.data.tokenizer import Marked
from megahybrid.evaluate.haystack import Material

EOD = 1
FIRST = 30  # characters from here on are ids from 2 on; the newline is id 2
VOCAB = 128 - FIRST + 2


class TextAlone:
    """What a tokenizer without special tokens has beside its text and ids."""

    special_tokens: ClassVar[dict[str, int]] = {}
    control_tokens: ClassVar[frozenset[str]] = frozenset()

    def encode_marked(self, texts: Sequence[str]) -> list[Marked]:
        raise NotImplementedError("no test writes conversations with it")

    def names(self) -> list[str]:
        raise NotImplementedError("it has no file")

    def token_id(self, token: str) -> int | None:
        return None


class Characters(TextAlone):
    """One id per ASCII character."""

    info = TokenizerInfo(kind="characters", sha256="0" * 64, vocab_size=VOCAB, eod_id=EOD)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[2 if c == "\n" else ord(c) - FIRST + 2 for c in text] for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray(ids, self.info.dtype) for ids in self.encode(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join("\n" if i == 2 else chr(i + FIRST - 2) for i in ids if i > 1)


def material() -> Material:
    """Without held-out sets."""
    return Material(VOCAB, Characters(), {})
