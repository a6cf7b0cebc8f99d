"""Answers, attention and held-out loss of rows that lie on context ranks, against one process."""

from typing import Any

import pytest
import torch

from megahybrid.config.parallel import ParallelConfig
from megahybrid.evaluate.answers import Score, score_answers
from megahybrid.evaluate.attention import AttentionStatistics, attention_of
from megahybrid.evaluate.example import Example
from megahybrid.evaluate.generation import greedy
from megahybrid.evaluate.sampling import next_token_logits
from megahybrid.model.row_shards import ContextRanks
from megahybrid.model.transformer import Transformer
from tests import distributed
from tests.parity import cases
from tests.plain_model import random_tensors

VOCAB = 50
# A window that crosses ranks; a learnt factor per head; a norm over the heads of all ranks; a sink;
# two views of the same keys, fused and split.
FAMILIES = ("rnope_swa", "ssmax", "projection", "sink", "fused", "split")
EXCHANGES = ({}, {"full": "keys", "windowed": "keys", "layout": "zigzag"})


def rows(*lengths: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (length,), generator=draw).tolist() for length in lengths]


def examples() -> list[Example]:
    """Two of one length and one of another; no degree divides any of them."""
    one, two, short = rows(29, 29, 7)
    return [
        Example(tuple(one), 20, 25, ((9, 14),)),
        Example(tuple(two), 3, 4, asked=(5, 17, 28)),
        Example(tuple(short), 0, 1),
    ]


def looked_at(ranks: Any, tensor: int, context: int, exchange: dict[str, str]) -> dict[str, Any]:
    """Everything that context ranks could spoil, of every family, on one rank."""
    mesh, found = ranks.mesh(tensor, context), {}
    for family in FAMILIES:
        config = cases.model(family, "parallel" if family == "ssmax" else "pre_norm")
        parallel = ParallelConfig(tensor=tensor, context=context, exchange=exchange)
        ranks_of_rows = ContextRanks(mesh, config, parallel)
        model = Transformer(config, mesh, context=ranks_of_rows).double()
        model.load_canonical(random_tensors(config, 3))
        text, two = examples()[0], torch.tensor([[0] * 11 + [11] * 18])
        attention = [
            attention_of(model, example, starts=starts, position_bins=4, chunk_tokens=7)
            for example, starts in [*((one, None) for one in examples()), (text, two)]
        ]
        found[family] = {
            "scores": score_answers(model, examples(), vocab_size=VOCAB, batch_tokens=60),
            "next": next_token_logits(model, torch.tensor(rows(13, 13))),
            "greedy": greedy(model, rows(13, 5, 1), 4),
            "attention": [statistics for statistics, _ in attention],
            "answers": [logits for _, logits in attention],
        }
    return found


def same_scores(found: list[Score], expected: list[Score]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.exact, one.hits, one.tokens) == (other.exact, other.hits, other.tokens)
        assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-10)


def same_attention(found: AttentionStatistics, expected: AttentionStatistics) -> None:
    for name, truth in vars(expected).items():
        if isinstance(truth, torch.Tensor):
            torch.testing.assert_close(
                getattr(found, name), truth, rtol=1e-9, atol=1e-9, equal_nan=True
            )
        else:
            assert getattr(found, name) == truth


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    (found,) = distributed.run(1, looked_at, 1, 1, {})
    return found


@pytest.mark.parametrize("exchange", EXCHANGES, ids=["auto", "keys-zigzag"])
@pytest.mark.parametrize(("tensor", "context"), [(1, 2), (1, 4), (2, 2)])
def test_every_rank_finds_what_one_process_finds(
    single: dict[str, Any], tensor: int, context: int, exchange: dict[str, str]
) -> None:
    for of_rank in distributed.run(tensor * context, looked_at, tensor, context, exchange):
        for family, found in of_rank.items():
            expected = single[family]
            same_scores(found["scores"], expected["scores"])
            assert found["greedy"] == expected["greedy"]
            torch.testing.assert_close(found["next"], expected["next"], rtol=1e-10, atol=1e-10)
            for one, other in zip(found["answers"], expected["answers"], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
            for one, other in zip(found["attention"], expected["attention"], strict=True):
                same_attention(one, other)
