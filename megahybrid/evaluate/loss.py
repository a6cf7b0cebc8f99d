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

from megahybrid.ledger import PositionBucket, bits_per_byte
from megahybrid.ledger.records import to_json
from megahybrid.parallel.collectives import all_reduce
from megahybrid.parallel.mesh import Axis

# (tokens, targets, starts) -> loss of each token in nats, 0 where the target does not count
TokenLoss = Callable[
    [Int[Tensor, "batch seq"], Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]],
    Float[Tensor, "batch seq"],
]
Rows = Iterable[tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class HeldOutLoss:
    """The score of one set at one length."""

    loss: float | None  # nats per token; None for a set without a single target
    tokens: int
    length: int
    by_position: tuple[PositionBucket, ...]
    # Of text that the targets stand for; None where the tokenizer is not known.
    bytes: int | None = None
    # The same documents at every position; None where rows are no documents.
    same_documents: tuple[PositionBucket, ...] | None = None

    @property
    def perplexity(self) -> float | None:
        """exp(loss), a per-token figure: it depends on the tokenizer."""
        # Beyond 700 nats exp leaves float64's range; such a loss is broken and has no perplexity.
        return math.exp(self.loss) if self.loss is not None and self.loss < 700 else None

    @property
    def bits_per_token(self) -> float | None:
        """The loss in bits."""
        return None if self.loss is None else self.loss / math.log(2)

    @property
    def bits_per_byte(self) -> float | None:
        """The loss in bits per byte of text: it can be compared with another tokenizer's."""
        return bits_per_byte(self.loss, self.tokens, self.bytes)

    def to_json(self) -> dict[str, Any]:
        """Return the score as the ledger keeps it."""
        known = {
            "loss": self.loss,
            "tokens": self.tokens,
            "length": self.length,
            "by_position": to_json(self.by_position),
        }
        if self.bytes is not None:
            known["bytes"] = self.bytes
        if self.same_documents is not None:
            known["same_documents"] = to_json(self.same_documents)
        return known


def target_bytes(
    targets: Int[Tensor, "batch seq"], token_bytes: Int[Tensor, "n"] | None
) -> Float[Tensor, "batch seq"]:
    """The bytes of text that each target stands for; 0 where it does not count or none is known."""
    if token_bytes is None:
        return torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)
    found = token_bytes[targets.clamp(min=0)].double()
    return found.masked_fill(targets == -100, 0)


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
    token_bytes: Int[Tensor, "n"] | None = None,
) -> HeldOutLoss:
    """Score this replica's `rows` and sum over all. Every rank must call it with the same number of
    batches (a batch may have no valid target). `adds` says whether this rank adds rows of so many
    tokens to the sum, which ranks that share a row do once. `token_bytes` holds the bytes of text
    that each id stands for.

    Buckets reach to `longest`, so that curves of several lengths share one axis; a position counts
    from the document's start, because a token sees its own document only.
    """
    edges = torch.tensor(position_edges(longest), device=device)
    sums = torch.zeros(3, len(edges) - 1, dtype=torch.float64, device=device)
    for tokens, targets, starts in rows:
        tokens, targets, starts = tokens.to(device), targets.to(device), starts.to(device)
        losses = token_loss(tokens, targets, starts)
        if not adds(tokens.shape[1]):
            continue
        valid = (targets != -100).flatten()
        position = torch.arange(tokens.shape[1], device=device) - starts
        bucket = torch.bucketize(position.flatten()[valid], edges, right=True) - 1
        bucket.clamp_(max=len(edges) - 2)
        sums[0].index_add_(0, bucket, losses.flatten()[valid].double())
        sums[1].index_add_(0, bucket, torch.ones_like(bucket, dtype=torch.float64))
        sums[2].index_add_(0, bucket, target_bytes(targets, token_bytes).flatten()[valid])
    losses_by_bucket, counts, text = all_reduce(sums, replicas).cpu().tolist()
    bounds = edges.cpu().tolist()
    buckets = tuple(
        PositionBucket(start, stop, int(count), total / count if count else None)
        for start, stop, total, count in zip(
            bounds[:-1], bounds[1:], losses_by_bucket, counts, strict=True
        )
    )
    tokens_scored = int(sum(counts))
    mean = sum(losses_by_bucket) / tokens_scored if tokens_scored else None
    known = None if token_bytes is None else int(sum(text))
    return HeldOutLoss(mean, tokens_scored, length, buckets, known)


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
