"""Keys and values of tokens already seen: a ring where a layer has a window, everything else whole.

Rows of a batch end together: shorter ones stand to the right, and what fills them on the left is a
document of its own that nothing sees. A column is a place in the row, counted from the first one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from megahybrid.config.attention import AttentionScheme, rotation_of
from megahybrid.model.attention import Attention
from megahybrid.model.context import SequenceContext, View
from megahybrid.model.core_attention import core_attention
from megahybrid.model.kernels import AttentionSpec, Documents
from megahybrid.model.rotary import RotaryTable, rotate
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.collectives import gather_sequence, local_slice
from megahybrid.parallel.mesh import Axis


class SeenKeys(NamedTuple):
    """The queries of a layer with the keys that they see, in one of its views."""

    q: Tensor  # [seq batch heads head_dim], as they meet keys
    keys: Tensor  # [batch kv_heads keys head_dim]
    allowed: Tensor  # [batch queries keys]: which keys each query sees
    scale: float
    sinks: Tensor | None = None  # [heads]: a logit beside the scores


# (layer, the one view of its keys or near and far, columns of the queries, of the keys, where there
#  are two the share of near [seq batch heads 1])
Observer = Callable[[int, tuple[SeenKeys, ...], Tensor, Tensor, Tensor | None], None]


class LayerCache:
    """The rotated keys and the values of one layer, for at most `capacity` columns. Of a layer with
    two views of its keys the far view's are kept, not rotated: each view does so as it reads them.

    A layer with a window or chunks keeps as many columns as these count: column c lies in slot
    c mod slots.
    """

    def __init__(
        self,
        scheme: AttentionScheme,
        shape: tuple[int, int, int],
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        batch, kv_heads, head_dim = shape
        self.scheme = scheme
        self.slots = capacity if scheme.reach is None else min(scheme.reach, capacity)
        self.keys = torch.zeros(batch, kv_heads, self.slots, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)

    @property
    def bytes(self) -> int:
        """Memory of its keys and values, in bytes."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values))

    def extend(
        self,
        k: Float[Tensor, "batch kv_heads new head_dim"],
        v: Float[Tensor, "batch kv_heads new head_dim"],
        first: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Takes in columns first, first + 1, …; returns keys, values and columns that they see.

        One new column goes straight into its slot and the ring is read where it lies; several are
        joined to what is kept, because the first of them still sees what the last will overwrite.
        """
        new = k.shape[2]
        slots = torch.arange(self.slots, device=k.device)
        if new == 1 or self.scheme.reach is None:
            where = torch.arange(first, first + new, device=k.device) % self.slots
            self.keys.index_copy_(2, where, k)
            self.values.index_copy_(2, where, v)
            filled = min(first + new, self.slots)
            last = first + new - 1
            columns = last - (last - slots[:filled]) % self.slots
            return self.keys[:, :, :filled], self.values[:, :, :filled], columns
        kept = torch.arange(max(0, first - self.slots), first, device=k.device)
        columns = torch.arange(int(first - len(kept)), first + new, device=k.device)
        whole_k = torch.cat((self.keys[:, :, kept % self.slots], k), dim=2)
        whole_v = torch.cat((self.values[:, :, kept % self.slots], v), dim=2)
        newest = columns[-min(new, self.slots) :]
        self.keys[:, :, newest % self.slots] = k[:, :, -len(newest) :]
        self.values[:, :, newest % self.slots] = v[:, :, -len(newest) :]
        return whole_k, whole_v, columns


class Cache:
    """One `LayerCache` per layer, and the columns of `starts` passed so far.

    `starts` [batch, capacity] is the column at which each column's document begins. `observe` is
    told of every layer's queries and keys. On a tensor axis each rank keeps its own heads' keys,
    and every rank calls everything alike: columns that do not cut evenly along the sequence are
    filled up with some that are never kept (`filled`).
    """

    def __init__(
        self,
        model: Transformer,
        starts: Int[Tensor, "batch capacity"],
        *,
        layers: range | None = None,
        observe: Observer | None = None,
    ) -> None:
        weight, self.tensor = model.embedding.weight, model.mesh.tensor
        self.starts, self.observe = starts.to(weight.device), observe
        batch, capacity = starts.shape
        # More tensor ranks than heads of keys: each holds the one that its queries share.
        kv_heads = max(1, model.config.num_kv_heads // self.tensor.size)
        shape = (batch, kv_heads, model.config.head_dim)
        self.layers = {
            index: LayerCache(scheme, shape, capacity, weight.dtype, weight.device)
            for index, scheme in enumerate(schemes_of(model))
            if layers is None or index in layers
        }
        self.masks: dict[object, Tensor] = {}

    @property
    def bytes(self) -> int:
        """Memory of all keys and values held, in bytes."""
        return sum(layer.bytes for layer in self.layers.values())

    def context(
        self, layers: Iterator[int], first: int, columns: int, hidden: Tensor
    ) -> SequenceContext:
        """Return what blocks need to go on at column `first` with `columns` more, `filled` up.

        `layers` gives the index of each layer that will ask, in order; `hidden` tells device and
        dtype.
        """
        length = columns + -columns % self.tensor.size
        starts = self.starts[:, first : first + columns]
        starts = torch.cat((starts, starts[:, -1:].expand(-1, length - columns)), dim=1)
        # Counted from the chunk's own first column, so that positions go on where they were.
        documents = Documents(starts - first)
        self.masks = {}

        def attention(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, kernel: str) -> Tensor:
            q, k, v = q[:columns], k[:columns], v[:columns]
            return filled(self._attend(next(layers), q, k, v, first, spec), self.tensor)

        def views(
            asked: Sequence[View], k: Tensor, v: Tensor, share: Tensor
        ) -> tuple[Tensor, Tensor]:
            asked = [view._replace(q=view.q[:columns]) for view in asked]
            share = share.expand(length, *asked[0].q.shape[1:3], 1)[:columns]
            parts = (k[:columns], v[:columns], share)
            near, far = self._attend_views(next(layers), asked, *parts, first)
            return filled(near, self.tensor), filled(far, self.tensor)

        where = (length, documents, hidden.device, hidden.dtype)
        return SequenceContext(*where, attention=attention, two_views=views)

    def _attend(
        self, index: int, q: Tensor, k: Tensor, v: Tensor, first: int, spec: AttentionSpec
    ) -> Float[Tensor, "seq batch heads head_dim"]:
        """Core attention of the new columns to all that are kept: which keys are seen is said one
        by one, and whatever else a layer asks stays."""
        layer = self.layers[index]
        keys, values, columns = layer.extend(k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3), first)
        queries = torch.arange(first, first + len(q), device=q.device)
        allowed = self._allowed(layer.scheme, queries, columns)
        if self.observe is not None:
            met = SeenKeys(q, keys, allowed, spec.scale, spec.sinks)
            self.observe(index, (met,), queries, columns, None)
        keys, values = (x.permute(2, 0, 1, 3) for x in (keys, values))
        spec = replace(spec, window=None, documents=None, visible=allowed)
        # The layer's own kernel is for whole batches.
        return core_attention(q, keys, values, spec, "auto")

    def _attend_views(
        self, index: int, views: Sequence[View], k: Tensor, v: Tensor, share: Tensor, first: int
    ) -> tuple[Tensor, ...]:
        """Core attention of the new columns in each view of a layer, which rotates keys as it reads
        them: they are kept once."""
        layer, new = self.layers[index], len(k)
        keys, values, columns = layer.extend(k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3), first)
        queries = torch.arange(first, first + new, device=k.device)
        keys, values = (x.permute(2, 0, 1, 3) for x in (keys, values))
        outs, met = [], []
        for view in views:
            window, some = view.scheme.window, slice(None)
            if window is not None and layer.scheme.window is None and self.observe is None:
                some = slice(max(0, first - window + 1), None)  # no query sees those before
            turned = self._rotated(keys[some], columns[some], view)
            allowed = self._allowed(view.scheme, queries, columns[some])
            spec = AttentionSpec(scale=view.scale, visible=allowed)
            outs.append(core_attention(view.q, turned, values[some], spec, "auto"))
            met.append(SeenKeys(view.q, turned.permute(1, 2, 0, 3), allowed, view.scale))
        if self.observe is not None:
            self.observe(index, tuple(met), queries, columns, share)
        return tuple(outs)

    def _rotated(self, keys: Tensor, columns: Tensor, view: View) -> Tensor:
        """Keys [keys batch kv_heads head_dim] at their positions, as a view rotates them."""
        rope = rotation_of(view.scheme.position)
        if rope is None:
            return keys
        positions = (columns - self.starts[:, columns]).T
        return rotate(keys, RotaryTable.at(rope, keys.shape[-1], positions, keys.dtype))

    def _allowed(self, scheme: AttentionScheme, queries: Tensor, columns: Tensor) -> Tensor:
        """Return which of these columns the queries see, [batch queries keys]."""
        window, chunk = scheme.window, scheme.chunk
        key = (window, chunk, len(columns))
        if key not in self.masks:
            starts = self.starts if chunk is None else Documents(self.starts).cut(chunk).starts
            self.masks[key] = seen(starts, queries, columns, window)
        return self.masks[key]


def filled(x: Float[Tensor, "seq *rest"], tensor: Axis) -> Float[Tensor, "seq_filled *rest"]:
    """Rows of zeros added until the tensor axis divides the sequence."""
    return torch.cat((x, x.new_zeros(-len(x) % tensor.size, *x.shape[1:])))


def schemes_of(model: Transformer) -> list[AttentionScheme]:
    """The scheme of each layer, as the model computes it."""
    found = []
    for block in model.blocks:
        attention = block.get_submodule("attention")
        assert isinstance(attention, Attention)
        found.append(attention.scheme)
    return found


def seen(
    starts: Int[Tensor, "batch capacity"],
    queries: Int[Tensor, "queries"],
    columns: Int[Tensor, "keys"],
    window: int | None,
) -> Bool[Tensor, "batch queries keys"]:
    """Return the columns that queries see: their document's, up to their own, in the window."""
    query = queries[:, None]
    allowed = (columns <= query) & (columns >= starts[:, queries, None])
    return allowed if window is None else allowed & (columns > query - window)


@torch.no_grad()
def by_layers(
    model: Transformer,
    tokens: Int[Tensor, "batch seq"],
    starts: Int[Tensor, "batch seq"],
    *,
    observe: Observer | None = None,
    chunk_tokens: int = 512,
) -> Float[Tensor, "seq batch hidden"]:
    """The final norm's output, computed layer after layer, each in chunks of the sequence.

    Memory beyond the weights: seq × batch × hidden once (changed in place), keys and values of one
    layer, and what one chunk needs: no term grows with the square of the length, nor with layers.
    On a tensor axis every rank calls it alike and has the whole result.
    """
    tensor, length = model.mesh.tensor, tokens.shape[1]
    embedded = model.embedding(F.pad(tokens, (0, -length % tensor.size)))
    hidden = gather_sequence(embedded, tensor)[:length]
    for index, block in enumerate(model.blocks):
        cache = Cache(model, starts, layers=range(index, index + 1), observe=observe)
        for first in range(0, length, chunk_tokens):
            chunk = hidden[first : first + chunk_tokens]
            context = cache.context(iter((index,)), first, len(chunk), chunk)
            mine = local_slice(filled(chunk, tensor), tensor)
            chunk.copy_(gather_sequence(block(mine, context), tensor)[: len(chunk)])
    for first in range(0, len(hidden), chunk_tokens):
        chunk = hidden[first : first + chunk_tokens]
        chunk.copy_(model.final_norm(chunk))
    return hidden
