"""Scores of answers: teacher-forced exact match, log-likelihood, and how sure a rate is."""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megahybrid.evaluate.example import Example, same_length
from megahybrid.evaluate.hidden_rows import HiddenRows
from megahybrid.model.transformer import Transformer


@dataclass(frozen=True)
class Score:
    """One example's answer under a model."""

    exact: bool  # every token of the answer is the likeliest one: greedy decoding writes it
    hits: float  # share of its counted tokens that are
    log_likelihood: float  # nats, of the counted tokens together
    tokens: int  # counted


@torch.no_grad()
def score_answers(
    model: Transformer,
    examples: Sequence[Example],
    *,
    vocab_size: int | None = None,
    batch_tokens: int = 16_384,
    tell: Callable[[int], None] = lambda done: None,
    advance: Callable[[int], object] = bool,
) -> list[Score]:
    """The score of each example, in order; `tell` is told how many are done, `advance` how many
    tokens were read since it was last told.

    The likeliest token is the lowest id of equals among those below `vocab_size`, the tokenizer's;
    likelihoods are over the same. Any layout: all ranks of tensor and context axes call it alike.
    """
    scores: dict[int, Score] = {}
    positions = {id(example): index for index, example in enumerate(examples)}
    for batch in same_length(examples, batch_tokens):
        for example, score in zip(batch, _score_batch(model, batch, vocab_size), strict=True):
            scores[positions[id(example)]] = score
        tell(len(scores))
        advance(sum(len(example.tokens) for example in batch))
    return [scores[index] for index in range(len(examples))]


def _score_batch(
    model: Transformer, batch: Sequence[Example], vocab_size: int | None
) -> Iterable[Score]:
    device = model.embedding.weight.device
    tokens = torch.tensor([example.tokens for example in batch], device=device)
    hidden = HiddenRows(model, tokens)
    for row, example in enumerate(batch):
        positions = torch.tensor(example.counted, device=device)
        asked = hidden.at(positions - 1, row)[:, None]
        logits = model.head.logits(asked, model.config.logit_scale)[
            : len(positions), 0, :vocab_size
        ]
        wanted = tokens[row, positions]
        likely = logits.double().log_softmax(dim=-1).gather(1, wanted[:, None])
        hit = logits.argmax(dim=-1) == wanted
        yield Score(
            bool(hit.all()), float(hit.double().mean()), float(likely.sum()), len(positions)
        )


@dataclass(frozen=True)
class Rate:
    """A share of successes with its Wilson interval."""

    value: float
    low: float
    high: float
    count: int


def wilson(share: float, count: int, confidence_z: float = 1.959964) -> Rate:
    """The share of `count` trials with Wilson's interval (1927), 95 % by default.

    Unlike the normal interval it says something of 0 and 1, where needles often are.
    """
    if not count:
        return Rate(math.nan, 0.0, 1.0, 0)
    z2 = confidence_z**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    half = confidence_z * math.sqrt(share * (1 - share) / count + z2 / (4 * count)) / (1 + z2)
    return Rate(share, max(0.0, centre - half), min(1.0, centre + half), count)


def by_labels(
    examples: Sequence[Example], scores: Sequence[Score], names: Sequence[str]
) -> list[dict[str, Any]]:
    """One row of rates for each value of the labels `names` (length, depth, …), in order."""
    groups: dict[tuple[Hashable, ...], list[Score]] = {}
    for example, score in zip(examples, scores, strict=True):
        groups.setdefault(tuple(example.labels.get(name) for name in names), []).append(score)
    rows = []
    for values, group in groups.items():
        exact = wilson(sum(score.exact for score in group) / len(group), len(group))
        counted = sum(score.tokens for score in group)
        likely = sum(score.log_likelihood for score in group)
        rows.append(
            dict(zip(names, values, strict=True))
            | {
                "trials": len(group),
                "exact": exact.value,
                "exact_low": exact.low,
                "exact_high": exact.high,
                "token_accuracy": sum(s.hits * s.tokens for s in group) / counted,
                "log_likelihood": likely / len(group),
                "log_likelihood_per_token": likely / counted,
            }
        )
    return rows
