"""Held-out loss, whole and by position: how much a longer past helps, and how far it reaches.

Takes a model and rows of tokens and knows nothing of training, so that training can call it.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megahybrid.ledger import PositionBucket, TurnLoss
from megahybrid.parallel.collectives import all_reduce
from megahybrid.parallel.mesh import Axis

# (tokens, targets, starts) -> loss of each token in nats, 0 where the target does not count
TokenLoss = Callable[
    [Int[Tensor, "batch seq"], Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]],
    Float[Tensor, "batch seq"],
]
Rows = Iterable[tuple[Tensor, Tensor, Tensor]]
TURNS = 16  # of a conversation are told apart; later ones count with the last


@dataclass(frozen=True)
class HeldOutLoss:
    """The score of one set at one length."""

    loss: float | None  # nats per token; None for a set without a single target
    tokens: int
    length: int
    by_position: tuple[PositionBucket, ...]
    by_turn: tuple[TurnLoss, ...] | None = None  # of rows that are a conversation each

    @property
    def perplexity(self) -> float | None:
        """exp(loss), a per-token figure: it depends on the tokenizer."""
        # Beyond 700 nats exp leaves float64's range; such a loss is broken and has no perplexity.
        return math.exp(self.loss) if self.loss is not None and self.loss < 700 else None

    @property
    def bits_per_token(self) -> float | None:
        """The loss in bits."""
        return None if self.loss is None else self.loss / math.log(2)

    def to_json(self) -> dict[str, Any]:
        """Return the score as the ledger keeps it."""
        found: dict[str, Any] = {
            "loss": self.loss,
            "tokens": self.tokens,
            "length": self.length,
            "by_position": [vars(bucket) for bucket in self.by_position],
        }
        if self.by_turn is not None:
            found["by_turn"] = [vars(one) for one in self.by_turn]
        return found


def position_edges(longest: int) -> list[int]:
    """Edges of log-spaced buckets: 0, 1, 2, 4, … and `longest` last."""
    edges = [0, 1]
    while edges[-1] < longest:
        edges.append(min(2 * edges[-1], longest))
    return edges


@torch.no_grad()
def held_out_loss(
    token_loss: TokenLoss,
    rows: Rows,
    length: int,
    longest: int,
    replicas: Axis,
    device: torch.device,
    adds: Callable[[int], bool] = lambda tokens: True,
    turns: bool = False,
) -> HeldOutLoss:
    """Score this replica's `rows` and sum over all. Every rank must call it with the same number of
    batches (a batch may have no valid target). `adds` says whether this rank adds rows of so many
    tokens to the sum, which ranks that share a row do once.

    Buckets reach to `longest`, so that curves of several lengths share one axis; a position counts
    from the document's start, because a token sees its own document only. `turns`: each row is one
    conversation, whose targets are the assistant's turns, and the loss is told by turn as well.
    """
    edges = torch.tensor(position_edges(longest), device=device)
    places = len(edges) - 1
    sums = torch.zeros(2, places + TURNS * turns, dtype=torch.float64, device=device)
    for tokens, targets, starts in rows:
        tokens, targets, starts = tokens.to(device), targets.to(device), starts.to(device)
        losses = token_loss(tokens, targets, starts)
        if not adds(tokens.shape[1]):
            continue
        valid = (targets != -100).flatten()
        position = torch.arange(tokens.shape[1], device=device) - starts
        bucket = torch.bucketize(position.flatten()[valid], edges, right=True) - 1
        bucket.clamp_(max=len(edges) - 2)
        counted = losses.flatten()[valid].double()
        ones = torch.ones_like(bucket, dtype=torch.float64)
        sums[0].index_add_(0, bucket, counted)
        sums[1].index_add_(0, bucket, ones)
        if turns:
            turn = places + _turn(targets).flatten()[valid]
            sums[0].index_add_(0, turn, counted)
            sums[1].index_add_(0, turn, ones)
    whole = all_reduce(sums, replicas).cpu()
    losses_by_bucket, counts = whole[:, :places].tolist()
    bounds = edges.cpu().tolist()
    buckets = tuple(
        PositionBucket(start, stop, int(count), total / count if count else None)
        for start, stop, total, count in zip(
            bounds[:-1], bounds[1:], losses_by_bucket, counts, strict=True
        )
    )
    tokens_scored = int(sum(counts))
    mean = sum(losses_by_bucket) / tokens_scored if tokens_scored else None
    by_turn = _by_turn(*whole[:, places:].tolist()) if turns else None
    return HeldOutLoss(mean, tokens_scored, length, buckets, by_turn)


def _turn(targets: Tensor) -> Tensor:
    """The turn of each target, from 0 on: a turn is a run of targets that count."""
    valid = targets != -100
    before = torch.nn.functional.pad(valid[:, :-1], (1, 0))
    return ((valid & ~before).cumsum(dim=1) - 1).clamp(0, TURNS - 1)


def _by_turn(losses: list[float], counts: list[float]) -> tuple[TurnLoss, ...]:
    return tuple(
        TurnLoss(number, int(count), total / count)
        for number, (total, count) in enumerate(zip(losses, counts, strict=True), 1)
        if count
    )


def sliding(token_loss: TokenLoss, window: int, stride: int) -> TokenLoss:
    """Each token's loss as a model sees it that is shown `window` tokens at a time.

    Windows begin every `stride` tokens of a row; a token counts in the first that holds it, so all
    but those of the first window are shown at least the `window` - `stride` tokens before them.
    `starts` stays in force: other documents of a row are not seen.
    """

    def by_window(tokens: Tensor, targets: Tensor, starts: Tensor) -> Tensor:
        losses = token_loss(tokens[:, :window], targets[:, :window], starts[:, :window])
        done = min(window, tokens.shape[1])
        parts = [losses[:, :done]]
        while done < tokens.shape[1]:
            stop = min(done + stride, tokens.shape[1])
            shown = slice(stop - window, stop)
            counted = targets[:, shown].clone()
            counted[:, : window - (stop - done)] = -100
            boundaries = (starts[:, shown] - shown.start).clamp(min=0)
            seen = token_loss(tokens[:, shown], counted, boundaries)
            parts.append(seen[:, window - (stop - done) :])
            done = stop
        return torch.cat(parts, dim=1)

    return by_window
