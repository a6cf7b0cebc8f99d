"""The queries of a row that an observer asks for, where a row's keys lie on several ranks."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from megahybrid.evaluate.cache import Observer, SeenKeys, seen
from megahybrid.model.context import Met
from megahybrid.model.row_shards import RowShards


class ShardedQueries:
    """Watches one row pass through the layers: tells `observe`, of every layer, the row's queries
    from `first` on, and the keys that lie here. All context ranks of the row are told alike.

    No rank holds the keys of others: what observes adds up over the ranks of `shards.axis`.
    `starts` are those of the row before it was filled up; what filled it up is no query, is seen by
    none, and has the last column.
    """

    def __init__(
        self,
        shards: RowShards,
        starts: Int[Tensor, "one seq"],
        first: int,
        observe: Observer,
        chunk_tokens: int,
    ) -> None:
        device, length = starts.device, starts.shape[1]
        self._shards, self._starts, self._observe = shards, starts, observe
        self._chunks = torch.arange(first, length, device=device).split(chunk_tokens)
        self._positions = torch.cat(
            [torch.arange(start, stop, device=device) for start, stop in shards.segments]
        )
        self._columns = self._positions.clamp(max=length - 1)
        self._layer = 0

    def __call__(self, views: Sequence[Met], share: Tensor | None) -> None:
        """One layer's queries and keys [seq_local, 1, heads, head_dim], in one view or two with the
        share of near; collective."""
        if share is not None:
            share = share.expand(*views[0].q.shape[:3], 1)
        for queries in self._chunks:
            met = tuple(self._seen(view, queries) for view in views)
            of_rows = None if share is None else self._shards.pick(share, queries)
            self._observe(self._layer, met, queries, self._columns, of_rows)
        self._layer += 1

    def _seen(self, view: Met, queries: Tensor) -> SeenKeys:
        spec = view.spec
        # Documents of a layer with chunks are cut finer.
        starts = self._starts if spec.documents is None else spec.documents.starts
        allowed = seen(starts, queries, self._positions, spec.window)
        keys = view.k.permute(1, 2, 0, 3)
        return SeenKeys(self._shards.pick(view.q, queries), keys, allowed, spec.scale, spec.sinks)
