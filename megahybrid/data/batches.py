"""`Batch`: rows as the model takes them, and the cutting of a step's rows among ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from megahybrid.data.dataset import TokenDataset
from megahybrid.data.mixture import RowPlan
from megahybrid.data.token_file import Array
from megahybrid.errors import DataError

IGNORED = -100
Documents = Literal["masked", "joined"]
NOWHERE = np.zeros(0, np.int64)


class Tensors(NamedTuple):
    """Torch tensors [batch, seq], int64."""

    tokens: Any
    targets: Any
    starts: Any


@dataclass(frozen=True)
class Batch:
    """Rows in the ids' own width, and where in them documents end.

    ids [batch, seq + 1]: each row's inputs and the token that follows the last on disk. ignored:
    places (row * seq + column) whose target does not count: eod, a join, the end of the file, and
    whatever fills a short row. cuts: places that are the last of their document. Wide arrays are
    made from these when they are asked for, on the device that needs them.
    """

    ids: Array
    ignored: Array
    cuts: Array

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and inputs of a row."""
        return self.ids.shape[0], self.ids.shape[1] - 1

    @cached_property
    def tokens(self) -> Array:
        """Inputs [batch, seq], int64."""
        return self.ids[:, :-1].astype(np.int64)

    @cached_property
    def targets(self) -> Array:
        """The token that follows on disk [batch, seq], int64; -100 where it does not count."""
        targets = self.ids[:, 1:].astype(np.int64)
        targets.reshape(-1)[self.ignored] = IGNORED
        return targets

    @cached_property
    def starts(self) -> Array:
        """Index within the row of the first token of each token's document [batch, seq], int64."""
        rows, length = self.shape
        first = np.unique(np.concatenate([np.arange(rows) * length, self.cuts + 1]))
        first = first[first < rows * length]
        starts = np.repeat(first % length, np.diff(np.append(first, rows * length)))
        return starts.reshape(rows, length)

    def without_cuts(self) -> "Batch":
        """The same rows, each as if it were one document to attention."""
        return replace(self, cuts=NOWHERE)

    def tensors(self, device: Any = "cpu") -> Tensors:
        """The rows as torch tensors on `device` (the only place where data meets torch).

        Narrow ids travel to a GPU and are widened there. `starts` stays on the host: there the
        model finds where documents begin, and sends on what its kernels need.
        """
        import torch

        pinned = torch.device(device).type == "cuda"

        def move(values: Array) -> Any:
            tensor = torch.from_numpy(values)
            return tensor.pin_memory().to(device, non_blocking=True) if pinned else tensor

        # torch knows little of unsigned ids: they travel as signed ones of the same width.
        ids = move(self.ids.view(f"i{self.ids.dtype.itemsize}")).long()
        if self.ids.dtype.kind == "u":
            ids &= 2 ** (8 * self.ids.dtype.itemsize) - 1
        # A copy also of a single row, whose slice is contiguous as it lies.
        targets = ids[:, 1:].clone(memory_format=torch.contiguous_format)
        # Set by an index, a value would travel to a GPU as a tensor, and be waited for.
        targets.view(-1).index_fill_(0, move(self.ignored), IGNORED)
        starts = torch.from_numpy(self.starts)
        return Tensors(ids[:, :-1].contiguous(), targets, starts)


def make_batch(
    datasets: Mapping[str, TokenDataset],
    plans: Sequence[RowPlan],
    length: int,
    documents: Documents = "masked",
) -> Batch:
    """Reads the planned rows and marks their documents.

    documents=masked: a document ends at eod (or where the index of a file without eod says) and at
    joins. joined: only at joins. The target after eod does not count in either, nor does one that
    the data's own mask leaves out.
    A plan shorter than `length` is filled with id 0 that nothing counts and nothing sees.
    """
    used = {plan.source for plan in plans if plan.spans}
    dtypes = {datasets[name].dtype for name in used}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.int32 if dtypes else np.uint16)
    ids = np.empty((len(plans), length + 1), dtype)
    # Where one number ends the documents of all rows, it is looked for once, in the whole batch.
    eods = {datasets[name].eod_id for name in used}
    eod = eods.pop() if len(eods) == 1 else None
    ends: list[Array] = []  # flat index of each document's last token
    breaks: list[int] = []  # the same, of joins alone
    filled: list[Array] = []  # and what else does not count
    for row, plan in enumerate(plans):
        column = written = 0
        flat = row * length
        for start, size in plan.spans:
            dataset = datasets[plan.source]
            written = column + size + (start + size < dataset.tokens)
            tokens = ids[row, column:written]
            if dataset.dtype == dtype:
                dataset.read_into(start, tokens)
            else:
                tokens[:] = dataset.read(start, written - column, False)
            if eod is None:
                ends.append(dataset.document_ends(start, tokens[:size]) + (flat + column))
            if dataset.masked:
                # The token in column n is the target of column n - 1.
                unasked = dataset.uncounted(start, len(tokens)) + column
                filled.append(unasked[(unasked > 0) & (unasked <= length)] - 1 + flat)
            column += size
            if column < length or written == column:
                breaks.append(flat + column - 1)
        if written <= length:
            ids[row, written:] = 0
            filled.append(np.arange(flat + column, flat + length))
    _check_ids(datasets, plans, ids)
    if eod is not None:
        found = np.flatnonzero(ids == eod)
        rows, columns = np.divmod(found, length + 1)
        ends = [(found - rows)[columns < length]]
    joins = np.asarray(breaks, np.int64)
    last = np.concatenate([*ends, joins])
    return Batch(
        ids,
        np.concatenate([last, *filled]) if filled else last,
        last if documents == "masked" else joins,
    )


def _check_ids(datasets: Mapping[str, TokenDataset], plans: Sequence[RowPlan], ids: Array) -> None:
    """Looks at the whole batch at once; at the rows one by one only to name what is wrong."""
    smallest = min((datasets[plan.source].vocab_size for plan in plans if plan.spans), default=1)
    unsigned = np.dtype(f"u{ids.dtype.itemsize}")
    if (
        smallest > np.iinfo(unsigned).max
        or not ids.size
        or int(ids.view(unsigned).max()) < smallest
    ):
        return
    for plan in plans:
        dataset = datasets[plan.source] if plan.spans else None
        for start, size in plan.spans if dataset else ():
            assert dataset is not None
            dataset.read(start, size + (start + size < dataset.tokens))


def rank_rows(rows: int, rank: int, world_size: int, micro_rows: int) -> list[range]:
    """Return which of a step's rows each micro batch of `rank` has.

    They are rank, rank + world_size, … in turn. Raises DataError unless every rank gets whole micro
    batches.
    """
    if rows % (world_size * micro_rows):
        raise DataError(
            f"{rows} rows of a step do not divide into micro batches of {micro_rows} rows on "
            f"{world_size} data ranks. Make batch_tokens a multiple of micro_batch_tokens x data "
            "degree."
        )
    step = world_size * micro_rows
    return [range(first + rank, first + step, world_size) for first in range(0, rows, step)]
