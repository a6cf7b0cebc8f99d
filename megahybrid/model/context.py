"""What all layers share while one batch passes through: document boundaries and rotation tables."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

from megahybrid.config.attention import AttentionScheme, Rope
from megahybrid.model.activation_offload import OffloadedTensor
from megahybrid.model.core_attention import CoreAttention, core_attention
from megahybrid.model.kernels import AttentionSpec
from megahybrid.model.kernels.documents import Documents, chunks_of_rows
from megahybrid.model.rotary import RotaryTable, plain_table
from megahybrid.model.row_shards import RowShards
from megahybrid.parallel.exchange import Range


class View(NamedTuple):
    """One of a layer's two views: its prepared queries, the scale of q·k, and its scheme."""

    q: Tensor  # [seq batch heads head_dim]
    scale: float
    scheme: AttentionScheme


# (near and far, keys and values [seq batch kv_heads head_dim], the share of near): the attention
# output of each. Keys are those of the tokens that are here, as no view prepares them.
AttentionOfViews = Callable[[Sequence[View], Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Met(NamedTuple):
    """How a layer's queries meet their keys in a view, of the tokens that are here."""

    q: Tensor  # [seq_local batch heads head_dim]
    k: Tensor
    spec: AttentionSpec  # what is asked of a kernel


# (the one view of a layer or near and far, where there are two the share of near [seq_local or 1,
#  batch or 1, heads or 1, 1])
Watch = Callable[[Sequence[Met], Tensor | None], None]


@dataclass
class SequenceContext:
    """Built once per batch. `documents` is None where every row is one document.

    Tables are made when the first layer asks and shared by all layers of the same rotation.
    `attention` is called by every layer, in their order: what goes on from the keys of earlier
    tokens, or watches, stands there around `core_attention`. Training leaves it as it is.
    `length` and `documents` are those of whole rows; `shards` says which of their tokens are here,
    None where all are. `watch` is told of every layer's queries and keys of these tokens, before
    they meet those of other ranks; of a layer with two views both, with the share of near.
    `whole` is the same for whole rows, made where one is asked for. `two_views` stands in place of
    `attention` where a layer has two views of its keys and these are kept.
    `offloaded` has the inputs of layers that wait in host memory, the lowest first.
    """

    length: int
    documents: Documents | None
    device: torch.device
    dtype: torch.dtype
    tables: dict[tuple[Rope, int, Range | None], RotaryTable] = field(default_factory=dict)
    attention: CoreAttention = core_attention
    offloaded: list[OffloadedTensor] = field(default_factory=list)
    shards: RowShards | None = None
    watch: Watch | None = None
    two_views: AttentionOfViews | None = None
    whole: "SequenceContext | None" = None

    def of_whole_rows(self) -> "SequenceContext":
        """Return the same batch without context ranks: for heads of which all tokens are here."""
        if self.whole is None:
            self.whole = replace(self, shards=None, watch=None, tables={})
        return self.whole

    def rotary_table(self, rope: Rope, head_dim: int, stretch: Range | None = None) -> RotaryTable:
        """cos and sin for this batch's positions, which restart at each document: of the tokens
        that are here, or of a stretch of the whole rows."""
        key = (rope, head_dim, stretch)
        if key not in self.tables:
            where = (self.device, self.dtype)
            here = () if self.shards is None else self.shards.segments
            here = here if stretch is None else (stretch,)
            self.tables[key] = (
                plain_table(rope, head_dim, self.length, *where, *here)
                if self.documents is None
                else RotaryTable.build(
                    rope, head_dim, self.length, self.documents, *where, *([here] if here else [])
                )
            )
        return self.tables[key]

    def documents_of(self, chunk: int | None, batch: int) -> Documents | None:
        """Return the documents of a batch of so many rows for layers with chunks: cut finer. Of the
        whole rows; rotation and temperature go by those of the batch itself."""
        if chunk is None or chunk >= self.length:
            return self.documents
        if self.documents is None:
            return chunks_of_rows(chunk, batch, self.length, self.device)
        return self.documents.cut(chunk)

    def local(self, whole: Shaped[Tensor, "seq *rest"]) -> Shaped[Tensor, "seq_local *rest"]:
        """Return what belongs to the tokens that are here of what has an entry for each token."""
        return whole if self.shards is None else self.shards.cut(whole, dim=0)
