"""Whether answers end: prompts of held-out conversations, and what a model says to them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megahybrid.config.suite import ChatTask
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.token_file import Array
from megahybrid.errors import ConfigError
from megahybrid.evaluate.answers import wilson
from megahybrid.evaluate.example import Example
from megahybrid.evaluate.generation import greedy
from megahybrid.evaluate.haystack import Material
from megahybrid.model.transformer import Transformer


def turns_of(counts: Array) -> list[tuple[int, int]]:
    """The turns of the assistant in a document: [first, last + 1] of each run of targets."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], counts, [False]))))
    return [(int(first), int(stop)) for first, stop in edges.reshape(-1, 2)]


class ChatMaker:
    """Prompts drawn from a set of conversations, each from another one.

    The set knows where the assistant speaks, so no template is needed. Turns are asked that end
    with a special token or eod: another end could not be told from a word.
    """

    def __init__(self, name: str, task: ChatTask, material: Material) -> None:
        self.where = f"tasks.{name}"
        self.set, self.dataset = self._set_of(task, material)
        words = material.tokenizer
        assert words is not None  # `material_of` opens one for conversations
        self.special = {*words.special_tokens.values(), words.info.eod_id}

    def _set_of(self, task: ChatTask, material: Material) -> tuple[str, TokenDataset]:
        masked = [name for name, dataset in material.held_out.items() if dataset.masked]
        if task.set is None and masked:
            return masked[0], material.held_out[masked[0]]
        if task.set is None:
            raise ConfigError(
                f"{self.where} asks about conversations, and none of the run's held-out sets "
                f"({', '.join(material.held_out) or 'none'}) has targets of the assistant. Name "
                "one in data.held_out, made by `megahybrid data tokenize --chat`."
            )
        if task.set not in masked:
            why = "has no targets of an assistant"
            if task.set not in material.held_out:
                why = "is not in data.held_out"
            raise ConfigError(
                f"{self.where}.set={task.set} {why} (sets of conversations: "
                f"{', '.join(masked) or 'none'}). Name one made by `megahybrid data tokenize "
                "--chat`."
            )
        return task.set, material.held_out[task.set]

    def make(self, trials: int, draw: np.random.Generator) -> Iterator[Example]:
        """So many prompts, each with the answer that stands in the set. Raises ConfigError where
        there are fewer conversations."""
        found = 0
        for index in draw.permutation(self.dataset.documents):
            example = self._example(int(index), draw)
            if example is not None:
                found += 1
                yield example
            if found == trials:
                return
        raise ConfigError(
            f"{self.where}.trials={trials} asks for more conversations than set {self.set} has "
            f"with an answer that ends ({found}). Lower it, or hold more out."
        )

    def _example(self, index: int, draw: np.random.Generator) -> Example | None:
        start, size = self.dataset.document_span(index)
        tokens = self.dataset.read(start, size)
        turns = [
            (number, first, stop)
            for number, (first, stop) in enumerate(turns_of(self.dataset.counts(start, size)), 1)
            if first > 0 and int(tokens[stop - 1]) in self.special
        ]
        if not turns:
            return None
        number, first, stop = turns[int(draw.integers(len(turns)))]
        return Example(tuple(tokens[:stop].tolist()), first, first, labels={"turn": number})


@dataclass(frozen=True)
class Answered:
    """What a model said to a prompt: when its turn ended, and whether it said what the set says."""

    tokens: int | None  # with the end of the turn; None where it did not end
    exact: bool


def answer(
    model: Transformer,
    examples: Sequence[Example],
    most: int,
    *,
    vocab_size: int,
    eod_id: int,
    batch_tokens: int,
    tell: Callable[[int], None] = lambda done: None,
) -> list[Answered]:
    """What a model says to each prompt, the likeliest token each time and at most `most`, in order.

    A turn ends with any token that ends one in the examples. Any layout: all ranks of tensor and
    context axes call it alike.
    """
    ends = {example.tokens[-1] for example in examples}
    found: dict[int, Answered] = {}
    for batch in _batches(examples, most, batch_tokens):
        added = greedy(
            model,
            [examples[index].prompt for index in batch],
            most,
            vocab_size=vocab_size,
            ends=lambda tokens: tokens[-1] in ends or tokens[-1] == eod_id,
        )
        for index, tokens in zip(batch, added, strict=True):
            ended = len(tokens) if tokens[-1] in ends else None
            found[index] = Answered(ended, tuple(tokens) == examples[index].expected)
        tell(len(found))
    return [found[index] for index in range(len(examples))]


def _batches(examples: Sequence[Example], most: int, batch_tokens: int) -> Iterator[list[int]]:
    """Indices of examples of nearly one length, of at most `batch_tokens` tokens with answers."""
    batch: list[int] = []
    for index in sorted(range(len(examples)), key=lambda n: len(examples[n].prompt)):
        if batch and (len(batch) + 1) * (len(examples[index].prompt) + most) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def scores_of(
    examples: Sequence[Example], answers: Sequence[Answered], lengths: Sequence[int]
) -> dict[str, Any]:
    """The share of answers that ended within each length: by turn (`rows`), and of all with its
    Wilson interval and the share that is word for word the set's (`ended`)."""
    turns = [example.labels["turn"] for example in examples]
    rows = []
    for turn in sorted(set(turns)):
        mine = [one for one, its in zip(answers, turns, strict=True) if its == turn]
        for length in lengths:
            share = _ended(mine, length)
            error = (share * (1 - share) / (len(mine) - 1)) ** 0.5 if len(mine) > 1 else None
            rows.append(
                {
                    "task": f"turn {turn}",
                    "length": length,
                    "trials": len(mine),
                    "score": share,
                    "standard_error": error,
                }
            )
    whole = []
    for length in lengths:
        rate = wilson(_ended(answers, length), len(answers))
        exact = sum(one.exact and (one.tokens or 0) <= length for one in answers) / len(answers)
        told = {"ended": rate.value, "ended_low": rate.low, "ended_high": rate.high}
        whole.append({"length": length, "trials": len(answers), **told, "exact": exact})
    return {"rows": rows, "ended": whole}


def _ended(answers: Sequence[Answered], length: int) -> float:
    return sum(one.tokens is not None and one.tokens <= length for one in answers) / len(answers)
