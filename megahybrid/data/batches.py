"""`Batch`: rows as the model takes them, and the cutting of a step's rows among ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megahybrid.data.dataset import TokenDataset
from megahybrid.data.mixture import RowPlan
from megahybrid.data.token_file import Array
from megahybrid.errors import DataError

IGNORED = -100
Documents = Literal["masked", "joined"]


@dataclass(frozen=True)
class Batch:
    """Rows [batch, seq], int64, numpy arrays or (after `tensors`) torch tensors.

    targets: the token that follows on disk; -100 after eod, at a join and where nothing follows.
    starts: index within the row of the first token of each token's document.
    """

    tokens: Any
    targets: Any
    starts: Any

    def tensors(self, device: Any = "cpu") -> "Batch":
        """The same rows as torch tensors on `device` (the only place where data meets torch)."""
        import torch

        def move(values: Array) -> Any:
            tensor = torch.from_numpy(values)
            if torch.device(device).type == "cuda":
                return tensor.pin_memory().to(device, non_blocking=True)
            return tensor.to(device)

        return Batch(move(self.tokens), move(self.targets), move(self.starts))


def make_batch(
    datasets: Mapping[str, TokenDataset],
    plans: Sequence[RowPlan],
    length: int,
    documents: Documents = "masked",
) -> Batch:
    """Reads the planned rows and marks their documents.

    documents=masked: a document ends at eod (or where the index of a file without eod says) and at
    joins. joined: only at joins. The target after eod does not count in either.
    A plan shorter than `length` is filled with id 0 that nothing counts and nothing sees.
    """
    tokens = np.zeros((len(plans), length), np.int64)
    targets = np.zeros((len(plans), length), np.int64)
    ends: list[Array] = []  # flat index of each document's last token
    breaks: list[int] = []  # the same, of joins alone
    for row, plan in enumerate(plans):
        dataset, place = datasets[plan.source], 0
        for start, size in plan.spans:
            extra = 1 if start + size < dataset.tokens else 0
            ids = dataset.read(start, size + extra)
            tokens[row, place : place + size] = ids[:size]
            targets[row, place : place + size - 1 + extra] = ids[1:]
            flat = row * length + place
            ends.append(dataset.document_ends(start, ids[:size]) + flat)
            place += size
            if place < length or not extra:
                breaks.append(flat + size - 1)
        if place < length:
            targets[row, place:] = IGNORED
    flat_targets = targets.reshape(-1)
    last = np.concatenate([*ends, np.asarray(breaks, np.int64)])
    flat_targets[last] = IGNORED
    cuts = last if documents == "masked" else np.asarray(breaks, np.int64)
    first = np.unique(np.concatenate([np.arange(len(plans)) * length, cuts + 1]))
    first = first[first < targets.size]
    starts = np.repeat(first % length, np.diff(np.append(first, targets.size)))
    return Batch(tokens, targets, starts.reshape(tokens.shape))


def rank_rows(rows: int, rank: int, world_size: int, micro_rows: int) -> list[range]:
    """Which of a step's rows each micro batch of `rank` has: rank, rank + world_size, … in turn.

    Raises DataError unless every rank gets whole micro batches.
    """
    if rows % (world_size * micro_rows):
        raise DataError(
            f"{rows} rows of a step do not divide into micro batches of {micro_rows} rows on "
            f"{world_size} data ranks. Make batch_tokens a multiple of micro_batch_tokens x data "
            "degree."
        )
    step = world_size * micro_rows
    return [range(first + rank, first + step, world_size) for first in range(0, rows, step)]
