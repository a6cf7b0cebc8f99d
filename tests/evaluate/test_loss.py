import io
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from megahybrid.evaluate.loss import (
    HeldOutLoss,
    PositionBucket,
    held_out_loss,
    position_edges,
    sliding,
)
from megahybrid.evaluate.table import loss_table, position_table
from megahybrid.parallel.mesh import Axis

ALONE = Axis.single("data")
CPU = torch.device("cpu")


def random_rows(rows: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets of which a third do not count, and starts of random documents."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 50, (rows, length), generator=draw)
    targets = torch.randint(0, 50, (rows, length), generator=draw)
    targets[torch.rand(rows, length, generator=draw) < 0.3] = -100
    begins = torch.rand(rows, length, generator=draw) < 0.1
    begins[:, 0] = True
    starts = torch.where(begins, torch.arange(length), 0).cummax(dim=1).values
    return tokens, targets, starts


def losses_of(tokens: Tensor, targets: Tensor, starts: Tensor) -> Tensor:
    """A loss that tells every token apart."""
    losses = torch.sin(tokens.float() * 3 + targets) + torch.arange(tokens.shape[1]) / 7 + 2
    return torch.where(targets != -100, losses, 0)


def test_score_equals_a_loop_over_tokens() -> None:
    batches = [random_rows(3, 40), random_rows(1, 17, seed=1)]
    score = held_out_loss(losses_of, batches, 40, 64, ALONE, CPU)
    edges = [0, 1, 2, 4, 8, 16, 32, 64]
    sums, counts = [0.0] * 7, [0] * 7
    for tokens, targets, starts in batches:
        losses = losses_of(tokens, targets, starts)
        for row in range(tokens.shape[0]):
            for place in range(tokens.shape[1]):
                if targets[row, place] == -100:
                    continue
                position = place - int(starts[row, place])
                bucket = max(n for n in range(7) if edges[n] <= position)
                sums[bucket] += float(losses[row, place])
                counts[bucket] += 1
    assert score.tokens == sum(counts)
    assert score.loss == pytest.approx(sum(sums) / sum(counts), rel=1e-12)
    assert [bucket.tokens for bucket in score.by_position] == counts
    for bucket, total, count in zip(score.by_position, sums, counts, strict=True):
        assert bucket.loss == (pytest.approx(total / count, rel=1e-12) if count else None)


def test_bucket_without_a_token_is_empty_and_said_so() -> None:
    tokens, targets, starts = random_rows(2, 16)
    score = held_out_loss(losses_of, [(tokens, targets, starts * 0)], 16, 64, ALONE, CPU)
    assert [(bucket.start, bucket.stop) for bucket in score.by_position[-2:]] == [
        (16, 32),
        (32, 64),
    ]
    assert all(b.tokens == 0 and b.loss is None for b in score.by_position[-2:])
    assert score.to_json()["by_position"][-1] == {
        "start": 32,
        "stop": 64,
        "tokens": 0,
        "loss": None,
    }


def test_set_without_a_target_has_no_loss() -> None:
    tokens, targets, starts = random_rows(2, 16)
    score = held_out_loss(losses_of, [(tokens, targets * 0 - 100, starts)], 16, 64, ALONE, CPU)
    assert (score.loss, score.perplexity, score.bits_per_token, score.tokens) == (None,) * 3 + (0,)
    assert held_out_loss(losses_of, [], 16, 64, ALONE, CPU).loss is None


@given(st.integers(1, 10**7))
def test_edges_cover_each_position_once(longest: int) -> None:
    edges = position_edges(longest)
    assert edges[0] == 0 and edges[-1] == longest
    assert edges == sorted(set(edges))
    assert all(stop <= 2 * max(start, 1) for start, stop in itertools.pairwise(edges))


def test_perplexity_and_bits_are_the_loss_in_other_words() -> None:
    score = HeldOutLoss(math.log(8), 5, 16, ())
    assert score.perplexity == pytest.approx(8)
    assert score.bits_per_token == pytest.approx(3)
    assert HeldOutLoss(1e6, 5, 16, ()).perplexity is None


def test_tables_show_empty_buckets_and_where_training_ended() -> None:
    buckets = (
        PositionBucket(0, 1, 4, 2.5),
        PositionBucket(1, 2, 4, 2.25),
        PositionBucket(2, 4, 0, None),
    )
    scores = {
        "books": HeldOutLoss(2.0, 1234, 4, buckets),
        "empty": HeldOutLoss(None, 0, 4, buckets),
    }
    console = Console(file=io.StringIO(), width=100)
    console.print(loss_table(scores))
    console.print(position_table(scores, 2))
    lines = [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert ["books", "2.0000", "7.39", "2.8854", "1,234"] in lines
    assert ["empty", "–", "–", "–", "0"] in lines
    assert ["2", "–", "3", "–", "0", "–", "0"] in lines
    rule = lines.index(["1", "2.2500", "4", "2.2500", "4"]) + 1
    assert set("".join(lines[rule])) == {"─"}


@pytest.mark.parametrize("length", [5, 8, 13, 16, 17])
def test_a_sliding_window_shows_each_token_once_with_the_context_it_should(length: int) -> None:
    window, stride = 8, 3

    def context(tokens: Tensor, targets: Tensor, starts: Tensor) -> Tensor:
        """In place of a loss: 100 times the token, and how many of its document stood before."""
        before = torch.arange(tokens.shape[1]) - starts
        return torch.where(targets == -100, 0, 100 * tokens + before).double()

    tokens = torch.arange(2 * length).view(2, length)
    targets = tokens + 1
    targets[1, -1] = -100
    starts = torch.zeros_like(tokens)
    starts[1, 4:] = 4  # two documents in the second row
    found = sliding(context, window, stride)(tokens, targets, starts)
    for place in range(length):
        # The first window is read from its beginning, later ones end where the next stride does.
        end = min(length, window + -(-max(0, place + 1 - window) // stride) * stride)
        before = place - max(0, end - window)
        assert found[0, place] == 100 * place + before
        assert before >= min(place, window - stride)
        if place < length - 1:
            begin = max(4 if place >= 4 else 0, end - window)
            assert found[1, place] == 100 * (length + place) + place - begin
    assert found[1, -1] == 0
