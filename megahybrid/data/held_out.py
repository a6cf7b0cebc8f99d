"""Rows for evaluation: each held-out token once, in the file's order."""

from collections.abc import Iterator
from itertools import islice
from typing import Literal

from megahybrid.data.batches import Batch, Documents, make_batch
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.mixture import RowPlan

Rows = Literal["stream", "documents"]


def evaluation_plans(
    dataset: TokenDataset, length: int, rows: Rows = "stream", min_tokens: int = 1
) -> Iterator[RowPlan]:
    """Rows of at most `length` tokens; a short one is filled up where the batch is made.

    stream: the whole file cut every `length` tokens, the last piece short. documents: the first
    `length` tokens of each document of at least `min_tokens`, so that the index within the row is
    the position within the document (for loss by position).
    """
    if rows == "stream":
        for start in range(0, dataset.tokens, length):
            yield RowPlan("", ((start, min(length, dataset.tokens - start)),))
    else:
        for start, size in dataset.document_spans(min_tokens):
            yield RowPlan("", ((start, min(length, size)),))


def evaluation_batches(
    dataset: TokenDataset,
    length: int,
    micro_rows: int,
    *,
    rows: Rows = "stream",
    min_tokens: int = 1,
    max_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    documents: Documents = "masked",
) -> Iterator[Batch]:
    """Batches [micro_rows, length]; rank r of D has rows r, r + D, …

    Every rank gets the same number of batches, filled up with rows whose targets do not count:
    ranks must meet in their collectives. At most max_tokens // length rows (at least one).
    """
    plans = evaluation_plans(dataset, length, rows, min_tokens)
    if max_tokens is not None:
        plans = islice(plans, max(1, max_tokens // length))
    while step := list(islice(plans, micro_rows * world_size)):
        step += [RowPlan("", ())] * (micro_rows * world_size - len(step))
        yield make_batch({"": dataset}, step[rank::world_size], length, documents)
