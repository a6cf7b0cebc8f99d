"""Rows for evaluation: each held-out token at most once, in rows that all ranks cut alike."""

from collections.abc import Callable, Iterable, Iterator
from heapq import nlargest
from itertools import groupby, islice
from typing import Literal

from megahybrid.data.batches import Batch, Documents, make_batch
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.mixture import RowPlan

Rows = Literal["stream", "documents"]
SHORTEST_ROW = 64  # below it a row costs what its kernel launches cost


def evaluation_plans(
    dataset: TokenDataset,
    length: int,
    rows: Rows = "stream",
    min_tokens: int = 1,
    max_tokens: int | None = None,
) -> Iterator[RowPlan]:
    """Rows of at most `length` tokens; a short one is filled up where the batch is made.

    stream: the file cut every `length` tokens, the last piece short, up to max_tokens // length
    rows (at least one). documents: the first `length` tokens of documents of at least `min_tokens`,
    longest first, so that the index within the row is the position within the document (for loss
    by position); within `max_tokens` as `_chosen_documents` says.
    """
    if rows == "stream":
        most = None if max_tokens is None else max(1, max_tokens // length)
        for start in islice(range(0, dataset.tokens, length), most):
            yield RowPlan("", ((start, min(length, dataset.tokens - start)),))
    else:
        chosen = _chosen_documents(dataset, length, min_tokens, max_tokens)
        for start, size in sorted(chosen, key=lambda span: -span[1]):
            yield RowPlan("", ((start, size),))


def evaluation_tokens(
    dataset: TokenDataset,
    length: int,
    rows: Rows = "stream",
    min_tokens: int = 1,
    max_tokens: int | None = None,
    multiple: int = 1,
) -> int:
    """Return the tokens of all rows of `numbered_batches`, each filled up: what a model reads."""
    plans = evaluation_plans(dataset, length, rows, min_tokens, max_tokens)
    if rows == "stream":
        return length * sum(1 for _ in plans)
    return sum(_row_tokens(plan.spans[0][1], length, multiple) for plan in plans)


def numbered_batches(
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
    multiple: int = 1,
    sharing: Callable[[int], int] = lambda tokens: 1,
    most_sharing: int = 1,
) -> Iterator[tuple[list[int], Batch]]:
    """Batches of at most micro_rows x length tokens; rank r of D has rows r, r + D, … Each comes
    with the place of its rows among `evaluation_plans`, 0 for a row that only fills it up.

    `sharing` says how many neighbouring ranks get the same rows of so many tokens, of which each
    computes a part. Batches are of that size where `most_sharing` do, and smaller where fewer do.

    Rows of documents are as long as a document asks (a power of two times `multiple`, at most
    `length`): filling all of them to `length` would cost many times the tokens that are scored.
    Every rank gets batches of the same shapes, filled up with rows whose targets do not count:
    ranks must meet in their collectives.
    """
    plans = enumerate(evaluation_plans(dataset, length, rows, min_tokens, max_tokens))

    def row_tokens(numbered: tuple[int, RowPlan]) -> int:
        size = numbered[1].spans[0][1]
        return length if rows == "stream" else _row_tokens(size, length, multiple)

    for tokens, alike in groupby(plans, row_tokens):
        together = sharing(tokens)
        group, groups = rank // together, world_size // together
        micro = max(1, micro_rows * length * together // most_sharing // tokens)
        while step := list(islice(alike, micro * groups)):
            step += [(0, RowPlan("", ()))] * (-len(step) % groups)
            numbers, mine = (list(part) for part in zip(*step[group::groups], strict=True))
            dataset.check_unchanged(span for plan in mine for span in plan.spans)
            batch = make_batch({"": dataset}, mine, tokens, documents)
            if rows == "documents":
                # One document a row: what fills it up comes later and is seen by no counted token,
                # and attention without boundaries is faster.
                batch = batch.without_cuts()
            yield numbers, batch


def _row_tokens(size: int, length: int, multiple: int) -> int:
    row = multiple * (1 << max(0, (-(-SHORTEST_ROW // multiple) - 1).bit_length()))
    while row < size:
        row *= 2
    return min(row, length)


def _chosen_documents(
    dataset: TokenDataset, length: int, min_tokens: int, max_tokens: int | None
) -> list[tuple[int, int]]:
    """First token and size (at most `length`) of the documents that are scored.

    Half of the budget goes to the longest ones, without which far positions would stay empty (one
    document at least); the rest to the others in the file's order, because a few documents alone
    would make near positions noisy.
    """
    spans = [
        (start, min(size, length)) for start, size in dataset.document_spans(max(1, min_tokens))
    ]
    if max_tokens is None or not spans:
        return spans
    # No more than this many can fit, so a large set is not sorted whole.
    most = max(1, max_tokens // 2 // max(1, min_tokens))
    chosen = _within(nlargest(most, spans, key=lambda span: span[1]), max_tokens // 2)
    chosen = chosen or nlargest(1, spans, key=lambda span: span[1])
    taken = set(chosen)
    rest = max_tokens - sum(size for _, size in chosen)
    return chosen + _within((span for span in spans if span not in taken), rest)


def _within(spans: Iterable[tuple[int, int]], budget: int) -> list[tuple[int, int]]:
    """The first spans whose sizes sum to at most `budget`."""
    kept = []
    for span in spans:
        budget -= span[1]
        if budget < 0:
            break
        kept.append(span)
    return kept
