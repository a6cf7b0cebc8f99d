"""Loss by position of single documents: of all that are scored, and of the same ones everywhere.

Far positions are reached by few documents, near ones by many: a curve over all of them turns where
the documents change. So the buckets of `same_documents` hold those alone that reach the last.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from megahybrid.evaluate.by_document import DocumentSums, ratio_interval
from megahybrid.evaluate.context_gain import NumberedRows
from megahybrid.evaluate.loss import (
    TURNS,
    HeldOutLoss,
    TokenLoss,
    losses_by_turn,
    position_edges,
    target_bytes,
    turn_of,
)
from megahybrid.ledger import LEAST_DOCUMENTS, PositionBucket
from megahybrid.parallel.collectives import all_reduce
from megahybrid.parallel.mesh import Axis

LEAST_TOKENS = 256  # a mean of fewer is off by more than the differences that are looked for


@torch.no_grad()
def loss_by_document(
    token_loss: TokenLoss,
    rows: NumberedRows,
    sizes: Sequence[int],
    longest: int,
    replicas: Axis,
    device: torch.device,
    adds: Callable[[int], bool] = lambda tokens: True,
    token_bytes: Int[Tensor, "n"] | None = None,
    turns: bool = False,
) -> HeldOutLoss:
    """Score rows of one document each and sum over all replicas, as `held_out_loss` does, whose
    `turns` this has.

    Row n of a batch is document `numbers[n]`, of `sizes[numbers[n]]` tokens at most `longest`.
    """
    sums = DocumentSums(2, len(sizes), position_edges(longest), device)
    by_turn = torch.zeros(2, TURNS, dtype=torch.float64, device=device)
    for document, tokens, targets, starts in rows:
        document, tokens = document.to(device), tokens.to(device)
        targets, starts = targets.to(device), starts.to(device)
        losses = token_loss(tokens, targets, starts)
        if adds(tokens.shape[1]):
            position = torch.arange(tokens.shape[1], device=device) - starts
            text = target_bytes(targets, token_bytes)
            sums.add(document, position, targets != -100, losses, text)
            if turns:
                turn = turn_of(targets)[targets != -100]
                by_turn[0].index_add_(0, turn, losses[targets != -100].double())
                by_turn[1].index_add_(0, turn, torch.ones_like(turn, dtype=torch.float64))
    losses_by, text_by, counts = sums.total(replicas)  # each [documents, buckets]
    tokens_scored = int(counts.sum())
    told = losses_by_turn(*all_reduce(by_turn, replicas).cpu().tolist()) if turns else None
    return HeldOutLoss(
        loss=float(losses_by.sum()) / tokens_scored if tokens_scored else None,
        tokens=tokens_scored,
        length=longest,
        by_position=_buckets(losses_by, counts, sums.edges, sure=False),
        by_turn=told,
        bytes=None if token_bytes is None else int(text_by.sum()),
        same_documents=_of_the_same(losses_by, counts, sums.edges, np.asarray(sizes)),
    )


def _of_the_same(
    losses: np.ndarray, counts: np.ndarray, edges: list[int], sizes: np.ndarray
) -> tuple[PositionBucket, ...]:
    """Buckets up to the farthest edge that LEAST_DOCUMENTS documents reach (all, where there are
    fewer), of the documents that reach it. Near ones are joined until each has LEAST_TOKENS."""
    needed = min(LEAST_DOCUMENTS, len(sizes))
    last = max((edge for edge in edges if (sizes >= edge).sum() >= needed), default=0)
    chosen = sizes >= last
    if not last or not chosen.any():
        return ()
    least = LEAST_TOKENS / int(chosen.sum())
    kept = [0, *(edge for edge in edges if least <= edge < last), last]
    first = np.searchsorted(edges, kept[:-1])
    upto = edges.index(last)
    joined_losses, joined_counts = (
        np.add.reduceat(part[chosen, :upto], first, axis=1) for part in (losses, counts)
    )
    return _buckets(joined_losses, joined_counts, kept, sure=True)


def _buckets(
    losses: np.ndarray, counts: np.ndarray, edges: list[int], *, sure: bool
) -> tuple[PositionBucket, ...]:
    """The means of sums [documents, buckets], with intervals where they are asked for."""
    found = []
    for place, (start, stop) in enumerate(itertools.pairwise(edges)):
        tokens = int(counts[:, place].sum())
        found.append(
            PositionBucket(
                start,
                stop,
                tokens,
                float(losses[:, place].sum()) / tokens if tokens else None,
                int((counts[:, place] > 0).sum()),
                *(ratio_interval(losses[:, place], counts[:, place]) if sure else ()),
            )
        )
    return tuple(found)
