"""How many targets count in planned rows, found from the plan and the files alone.

The same number as `make_batch` leaves in a row, whichever rank reads it: so ledgers can say it of
a step, and an audit can find it again.
"""

from collections.abc import Iterable

import numpy as np

from megahybrid.data.dataset import TokenDataset
from megahybrid.data.order import Span


def counted_targets(dataset: TokenDataset, rows: Iterable[tuple[Span, ...]], length: int) -> int:
    """How many targets of rows of `length` tokens, given as spans of a dataset whose documents end
    with eod, count: none that its mask leaves out, that follows eod, or that is behind a join."""
    return sum(_of_row(dataset, spans, length) for spans in rows)


def _of_row(dataset: TokenDataset, spans: tuple[Span, ...], length: int) -> int:
    column = found = 0
    for start, size in spans:
        column += size
        # The target of a span's last token is the next on disk where the row ends there.
        targets = size - 1 + (column == length and start + size < dataset.tokens)
        if targets:
            counts = dataset.counts(start + 1, targets)
            counts[dataset.read(start, targets, False) == dataset.eod_id] = False
            found += int(np.count_nonzero(counts))
    return found
