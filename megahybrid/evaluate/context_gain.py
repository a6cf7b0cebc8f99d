"""Context gain: how many nats the tokens of a document further back than the last c are worth.

For each token with more than c tokens of context: its loss where the model is shown only the last
c of them, less its loss with all of them. Both are of the same token, so every document is its own
control. Positive where far tokens help, zero where they do not, negative where they hurt.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from megahybrid.evaluate.by_document import DocumentSums, ratio_interval
from megahybrid.evaluate.loss import TokenLoss, position_edges, target_bytes
from megahybrid.ledger import GainBucket, bits_per_byte
from megahybrid.ledger.records import to_json
from megahybrid.parallel.collectives import all_reduce
from megahybrid.parallel.mesh import Axis

# (number of each row's document, tokens, targets, starts)
NumberedRows = Iterable[tuple[Tensor, Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class ContextGain:
    """The gain of one set beyond one context. `loss` and `gain` are nats per token, over the same
    tokens: those with more than `context` tokens of context (None without one)."""

    context: int
    stride: int
    length: int  # how far documents were read
    tokens: int
    documents: int
    loss: float | None  # with all of their context
    gain: float | None
    low: float | None  # 95 % interval of the gain, over documents
    high: float | None
    bytes: int | None  # of text that these tokens stand for
    by_position: tuple[GainBucket, ...]

    @property
    def gain_bits_per_byte(self) -> float | None:
        """The gain in bits per byte of text, which other tokenizers' can be compared with."""
        return bits_per_byte(self.gain, self.tokens, self.bytes)

    def to_json(self) -> dict[str, Any]:
        """Return the gain as `evaluations` keep it."""
        return {name: to_json(value) for name, value in vars(self).items()} | {
            "gain_bits_per_byte": self.gain_bits_per_byte
        }


def default_stride(context: int) -> int:
    """Half of the context: each window then costs three times the tokens that it counts."""
    return max(1, context // 2)


def gain_edges(context: int, length: int) -> list[int]:
    """Edges of the buckets beyond a context: powers of two, so that several contexts share them."""
    return [context, *(edge for edge in position_edges(length) if edge > context)]


def beyond(
    targets: Int[Tensor, "batch seq"], starts: Int[Tensor, "batch seq"], context: int
) -> Bool[Tensor, "batch seq"]:
    """The tokens that have a target and more than `context` tokens of context (its own input is
    the last of them)."""
    position = torch.arange(targets.shape[1], device=targets.device) - starts
    return (targets != -100) & (position >= context)


def restarted_losses(
    token_loss: TokenLoss,
    tokens: Int[Tensor, "batch seq"],
    targets: Int[Tensor, "batch seq"],
    starts: Int[Tensor, "batch seq"],
    context: int,
    stride: int,
    rows_at_once: int = 1,
    agreed: Callable[[int], int] = lambda calls: calls,
) -> Float[Tensor, "batch seq"]:
    """Losses of the tokens that `beyond` names, each shown only the last `context` tokens of its
    document, or up to stride - 1 more; 0 elsewhere.

    Windows begin 1, 1 + stride, 1 + 2 stride, … tokens after the document does. Each is a row of
    its own, in which positions and the counts of score scales begin at its first token, and of
    which the tokens from the `context`th on count. So each costs context + stride tokens for
    stride of them. Documents that begin within a window stay apart. `agreed` turns this rank's
    number of calls of `token_loss` into that of all ranks that meet in it.
    """
    length = tokens.shape[1]
    counted = beyond(targets, starts, context)
    rows, places = counted.nonzero(as_tuple=True)
    # A window is known by its row and first token; each counted token lies in just one.
    begins = starts[rows, places]
    first = begins + 1 + (places - begins - context) // stride * stride
    keys, window = torch.unique(rows * length + first, return_inverse=True)
    losses = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
    width = min(context + stride, length)
    columns = torch.arange(width, device=tokens.device)
    for call in range(agreed(-(-len(keys) // rows_at_once))):
        mine = keys[call * rows_at_once : (call + 1) * rows_at_once]
        if not len(mine):  # others still have windows
            nothing = tokens.new_zeros((1, width))
            token_loss(nothing, nothing - 100, nothing)
            continue
        row, begin = mine[:, None] // length, mine[:, None] % length
        shown = (begin + columns).clamp(max=length - 1)
        inside = (window >= call * rows_at_once) & (window < call * rows_at_once + len(mine))
        line = window[inside] - call * rows_at_once
        column = places[inside] - first[inside]
        asked = torch.full_like(shown, -100)
        asked[line, column] = targets[rows[inside], places[inside]]
        found = token_loss(tokens[row, shown], asked, (starts[row, shown] - begin).clamp(min=0))
        losses[rows[inside], places[inside]] = found[line, column].double()
    return losses


@dataclass(frozen=True)
class Windows:
    """How one context is measured: its stride, and the windows that are computed at once."""

    context: int
    stride: int
    rows_at_once: int = 1

    @property
    def tokens(self) -> int:
        """The tokens of a window."""
        return self.context + self.stride


@torch.no_grad()
def context_gains(
    token_loss: TokenLoss,
    rows: NumberedRows,
    windows: Sequence[Windows],
    documents: int,
    length: int,
    replicas: Axis,
    device: torch.device,
    adds: Callable[[int], bool] = lambda tokens: True,
    token_bytes: Int[Tensor, "n"] | None = None,
) -> list[ContextGain]:
    """The gain beyond each context, over `rows` of one document each, and over all replicas.

    Rows are numbered below `documents`, alike on every rank; `adds` as `held_out_loss` takes it.
    Every rank must call it with the same number of batches of the same shapes.
    """
    kept = [
        DocumentSums(3, documents, gain_edges(each.context, length), device) for each in windows
    ]

    def agreed(calls: int) -> int:
        most = torch.tensor([calls], device=device)
        return int(all_reduce(most, replicas, "max"))

    for document, tokens, targets, starts in rows:
        document, tokens = document.to(device), tokens.to(device)
        targets, starts = targets.to(device), starts.to(device)
        whole = token_loss(tokens, targets, starts).double()
        position = torch.arange(tokens.shape[1], device=device) - starts
        text = target_bytes(targets, token_bytes)
        for each, sums in zip(windows, kept, strict=True):
            cut = restarted_losses(
                token_loss, tokens, targets, starts,
                each.context, each.stride, each.rows_at_once, agreed,
            )  # fmt: skip
            if adds(tokens.shape[1]):
                counted = beyond(targets, starts, each.context)
                sums.add(document, position, counted, cut - whole, whole, text)
    return [
        _gain(each, length, sums.edges, sums.total(replicas), token_bytes is not None)
        for each, sums in zip(windows, kept, strict=True)
    ]


def _gain(
    windows: Windows, length: int, edges: list[int], total: np.ndarray, text_known: bool
) -> ContextGain:
    """Means of the sums [gain, loss, bytes, tokens] by document and bucket."""
    buckets = tuple(
        GainBucket(start, stop, *_mean(total[0, :, place], total[3, :, place]))
        for place, (start, stop) in enumerate(itertools.pairwise(edges))
    )
    gains, losses, text, counts = total.sum(axis=2)
    tokens, documents, gain, low, high = _mean(gains, counts)
    return ContextGain(
        context=windows.context,
        stride=windows.stride,
        length=length,
        tokens=tokens,
        documents=documents,
        loss=float(losses.sum()) / tokens if tokens else None,
        gain=gain,
        low=low,
        high=high,
        bytes=int(text.sum()) if text_known else None,
        by_position=buckets,
    )


def _mean(
    sums: np.ndarray, counts: np.ndarray
) -> tuple[int, int, float | None, float | None, float | None]:
    """Tokens, documents, the mean and its interval."""
    tokens, documents = int(counts.sum()), int((counts > 0).sum())
    mean = float(sums.sum()) / tokens if tokens else None
    return tokens, documents, mean, *ratio_interval(sums, counts)
