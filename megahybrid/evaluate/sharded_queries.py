"""The queries of a row that an observer asks for, where a row's keys lie on several ranks."""

import torch
from jaxtyping import Int
from torch import Tensor

from megahybrid.evaluate.cache import Observer, SeenKeys, seen
from megahybrid.model.kernels import AttentionSpec
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

    def __call__(self, q: Tensor, k: Tensor, spec: AttentionSpec) -> None:
        """One layer's queries and keys [seq_local, 1, heads, head_dim]; collective."""
        keys = k.permute(1, 2, 0, 3)
        # Those of a layer with chunks are cut finer.
        starts = self._starts if spec.documents is None else spec.documents.starts
        for queries in self._chunks:
            allowed = seen(starts, queries, self._positions, spec.window)
            rows = self._shards.pick(q, queries)
            met = SeenKeys(rows, keys, allowed, spec.scale, spec.sinks)
            self._observe(self._layer, (met,), queries, self._columns, None)
        self._layer += 1
