"""The documents of a batch: where they begin, and what follows from it, made once per batch."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Made = TypeVar("Made")


class Span(NamedTuple):
    """Tokens start … stop - 1 of row `row`."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of a batch: `starts[b, i]` is the index, within row b, of the first token of
    the document that token i belongs to.

    Key j is visible to query i when starts[i] <= j <= i and, with a window, j > i - window. What
    kernels derive from this (masks, boundaries) is kept here, so that it is made once per batch
    and window and shared by every layer.
    """

    starts: Int[Tensor, "batch seq"]
    _kept: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[Sequence[int]], device: torch.device | str = "cpu"
    ) -> "Documents":
        """One list of document lengths per row; every row has the same sum."""
        rows = []
        for row in lengths:
            count = torch.tensor(list(row))
            rows.append((count.cumsum(0) - count).repeat_interleave(count))
        return cls(torch.stack(rows).to(device))

    @property
    def device(self) -> torch.device:
        """The device of `starts`."""
        return self.starts.device

    @property
    def seq(self) -> int:
        """Tokens per row."""
        return self.starts.shape[1]

    def to(self, device: torch.device | str) -> "Documents":
        """Return the same documents on `device`.

        Spans are found before the move, so that a batch that starts on the host never makes the
        accelerator wait for its own boundaries.
        """
        spans = self.spans()
        moved = Documents(to_device(self.starts, torch.device(device)))
        moved._kept["spans"] = spans
        return moved

    def stretch(self, first: int, last: int) -> "Documents":
        """Return the documents of positions first … last - 1 as if they were rows of their own: one
        that begins before them begins with them."""

        def cut() -> Documents:
            documents = Documents((self.starts[:, first:last] - first).clamp(min=0))
            documents._kept["spans"] = [
                Span(row, max(start - first, 0), min(stop, last) - first)
                for row, start, stop in self.spans()
                if start < last and stop > first
            ]
            return documents

        whole = (first, last) == (0, self.seq)
        return self if whole else self.keep(("stretch", first, last), cut)

    def cut(self, chunk: int) -> "Documents":
        """Return the documents that are left where each is cut after every `chunk` tokens."""

        def finer() -> Documents:
            documents = Documents(self.starts + self.positions() // chunk * chunk)
            if "spans" in self._kept:  # known to the host: nobody waits for a device
                documents._kept["spans"] = [
                    Span(row, first, min(first + chunk, stop))
                    for row, start, stop in self.spans()
                    for first in range(start, stop, chunk)
                ]
            return documents

        return self.keep(("cut", chunk), finer)

    def keep(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """Return what `make` gave the first time that `key` was asked for."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def positions(self) -> Int[Tensor, "batch seq"]:
        """Position of each token within its document, from 0."""
        return self.keep(
            "positions", lambda: torch.arange(self.seq, device=self.device) - self.starts
        )

    def visible_keys(self, window: int | None) -> Int[Tensor, "batch seq"]:
        """Return how many keys each query sees, itself included."""
        count = self.positions() + 1
        return count if window is None else count.clamp(max=window)

    def visible(self, window: int | None) -> Bool[Tensor, "batch seq seq"]:
        """The dense rule [batch, query, key]; seq × seq, for short sequences and tests."""
        return visible(self.starts, 0, self.seq, 0, self.seq, window)

    def spans(self) -> list[Span]:
        """Every document, row by row, on the host."""

        def find() -> list[Span]:
            starts = self.starts.cpu()
            changes = torch.ones_like(starts, dtype=torch.bool)
            changes[:, 1:] = starts[:, 1:] != starts[:, :-1]
            row, begin = (part.tolist() for part in changes.nonzero(as_tuple=True))
            ends = [
                begin[n + 1] if n + 1 < len(row) and row[n + 1] == row[n] else self.seq
                for n in range(len(row))
            ]
            return [Span(*span) for span in zip(row, begin, ends, strict=True)]

        return self.keep("spans", find)


@lru_cache(maxsize=8)
def chunks_of_rows(chunk: int, batch: int, length: int, device: torch.device) -> Documents:
    """Return `batch` rows of one document each, cut after every `chunk` tokens: the same for every
    batch."""
    return Documents(torch.zeros(batch, length, dtype=torch.int64)).cut(chunk).to(device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host's tensor on `device`, without either waiting for the other."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def visible(
    starts: Int[Tensor, "batch seq"],
    first_query: int,
    last_query: int,
    first_key: int,
    last_key: int,
    window: int | None,
) -> Bool[Tensor, "batch queries keys"]:
    """Return which keys first_key … last_key - 1 queries first_query … last_query - 1 may see."""
    query = torch.arange(first_query, last_query, device=starts.device)[:, None]
    key = torch.arange(first_key, last_key, device=starts.device)
    allowed = (key <= query) & (key >= starts[:, first_query:last_query, None])
    return allowed if window is None else allowed & (key > query - window)


def additive(allowed: Bool[Tensor, "*shape"], dtype: torch.dtype) -> Tensor:
    """0 where allowed, -inf elsewhere.

    SDPA turns a boolean mask into this at each call and keeps the result for backward, one copy
    per layer; made here it is shared.
    """
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
        ~allowed, float("-inf")
    )
