"""A text with a question, the answer that is expected, and where in it the answer stands."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from megahybrid.errors import ConfigError

SEGMENTS = ("begin", "needle", "context", "end")
LEARNED_SINK = "learned_sink"  # where layers have one; a column of masses, and no token's
BEGIN_TOKENS = 10  # arXiv 2501.18795: "begin" is the first ten tokens


@dataclass(frozen=True)
class Example:
    """Tokens of one document: haystack with needles, then question, then the expected answer.

    `question` and `answer` are the indices of their first tokens; the answer reaches to the end.
    `needles` are [start, stop) of the inserted sentences that hold the answer; `asked` are the
    indices of answer tokens that count (None: all). `labels` say what the example is (length,
    depth, …), for tables. `references` are the strings to find in generated text.
    """

    tokens: tuple[int, ...]
    question: int
    answer: int
    needles: tuple[tuple[int, int], ...] = ()
    asked: tuple[int, ...] | None = None
    labels: dict[str, Any] = field(default_factory=dict)
    references: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        size = len(self.tokens)
        if not 0 <= self.question <= self.answer < size or self.answer == 0:
            raise ConfigError(
                f"question={self.question} and answer={self.answer} do not lie in this order "
                f"within tokens ({size}). Put the answer last, behind at least one token."
            )
        if self.asked is not None and not all(self.answer <= n < size for n in self.asked):
            raise ConfigError(
                f"asked={list(self.asked)} lies outside the answer (tokens {self.answer} to "
                f"{size - 1}). Name tokens of the answer."
            )
        for start, stop in self.needles:
            if not 0 <= start < stop <= self.question:
                raise ConfigError(
                    f"needles={[start, stop]} is not a range before question={self.question}. "
                    "Give [first, last + 1]."
                )

    @property
    def prompt(self) -> tuple[int, ...]:
        """All but the answer."""
        return self.tokens[: self.answer]

    @property
    def expected(self) -> tuple[int, ...]:
        """The answer."""
        return self.tokens[self.answer :]

    @property
    def counted(self) -> tuple[int, ...]:
        """Indices of the answer tokens that count."""
        return self.asked or tuple(range(self.answer, len(self.tokens)))

    def segments(self, begin: int = BEGIN_TOKENS) -> Int[Tensor, "seq"]:
        """The index in SEGMENTS of each token.

        `end` is question and answer; a needle within the first ten tokens is needle, not begin.
        """
        labels = torch.full((len(self.tokens),), SEGMENTS.index("context"))
        labels[:begin] = SEGMENTS.index("begin")
        for start, stop in self.needles:
            labels[start:stop] = SEGMENTS.index("needle")
        labels[self.question :] = SEGMENTS.index("end")
        return labels


def same_length(examples: Sequence[Example], most_tokens: int) -> list[list[Example]]:
    """Batches of examples of one length, of at most `most_tokens` tokens (one example at least)."""
    batches: list[list[Example]] = []
    for example in sorted(examples, key=lambda one: len(one.tokens)):
        size = len(example.tokens)
        fits = batches and len(batches[-1][0].tokens) == size
        if fits and (len(batches[-1]) + 1) * size <= most_tokens:
            batches[-1].append(example)
        else:
            batches.append([example])
    return batches
