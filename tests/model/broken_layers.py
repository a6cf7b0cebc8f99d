"""Ways to break a layer's attention, one thing at a time."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megahybrid.config.attention import Nope, Rope
from megahybrid.model import attention, context, core_attention, norm, rotary, score_scale
from megahybrid.model.kernels import AttentionSpec, attend, blocked, documents, sdpa
from megahybrid.model.rotary import RotaryTable, rotate, rotate_both

Patch = pytest.MonkeyPatch


def attended_by(broken: Callable[..., Tensor]) -> Callable[[Patch], None]:
    """Another kernel in the layer."""
    return lambda patch: patch.setattr(core_attention, "attend", broken)


def tail_blocks(which: slice) -> Callable[[Patch], None]:
    """`blocked` knows nothing of documents in some of its tail blocks."""
    right = blocked._tail_masks

    def masks(docs: Any, window: int, dtype: torch.dtype) -> Tensor:
        joined = documents.Documents(torch.zeros_like(docs.starts))
        rows = docs.starts.shape[0]
        made, wrong = (right(x, window, dtype).unflatten(0, (rows, -1)) for x in (docs, joined))
        made[:, which] = wrong[:, which]
        return made.flatten(0, 1)

    return lambda patch: patch.setattr(blocked, "_tail_masks", masks)


def first_rows_runs(patch: Patch) -> None:
    """SDPA beyond its shared length cuts each row where the first one is cut."""
    right = sdpa._masks
    patch.setattr(sdpa, "_masks", lambda *args: [right(*args)[0]] * len(right(*args)))


def first_rows_mask(patch: Patch) -> None:
    """SDPA up to its shared length has the first row's mask for all."""
    right = documents.Documents.visible
    patch.setattr(
        documents.Documents, "visible", lambda *args: right(*args)[:1].expand_as(right(*args))
    )


def forward_with(change: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[[Patch], None]:
    """`Attention.forward` does something to q, k and v first."""
    right = attention.Attention.forward

    def forward(self: Any, q: Tensor, k: Tensor, v: Tensor, batch: Any, *more: Any) -> Tensor:
        return right(self, *change(self, q, k, v, batch), batch, *more)

    return lambda patch: patch.setattr(attention.Attention, "forward", forward)


def nope_turned(self: Any, q: Tensor, k: Tensor, v: Tensor, batch: Any) -> Any:
    """Layers without position rotate."""
    if isinstance(self.scheme.position, Nope):
        table = batch.rotary_table(Rope(kind="rope", theta=10000.0), self.head_dim)
        q, k = rotate_both(q, k, table)
    return q, k, v


def values_of_one_row(self: Any, q: Tensor, k: Tensor, v: Tensor, batch: Any) -> Any:
    """All rows read the first one's values."""
    return q, k, v[:, :1].expand_as(v)


def one_head_still(patch: Patch) -> None:
    """Head 3 is not rotated."""

    def turned(x: Tensor, table: RotaryTable) -> Tensor:
        out = rotate(x, table)
        return torch.cat((out[:, :, :3], x[:, :, 3:4], out[:, :, 4:]), dim=2)

    patch.setattr(rotary, "rotate", turned)


def wrong_way_back(patch: Patch) -> None:
    """The rotation's gradient is turned forward once more."""

    def backward(ctx: Any, *grads: Tensor) -> Any:
        return rotary._rotate(grads[0], *ctx.saved_tensors, 1), None, None

    patch.setattr(rotary._Rotation, "backward", staticmethod(backward))


def one_table(patch: Patch) -> None:
    """Tables are kept by head_dim alone: the second theta gets the first one's."""
    right = context.SequenceContext.rotary_table
    found: dict[Any, Any] = {}

    def table(self: Any, rope: Rope, head_dim: int) -> Any:
        return found.setdefault((id(self), head_dim), right(self, rope, head_dim))

    patch.setattr(context.SequenceContext, "rotary_table", table)


def scaled_by(wrong: Callable[[Any, int], float]) -> Callable[[Patch], None]:
    """The part of the scale that is the same for every query."""
    return lambda patch: patch.setattr(attention, "score_scale", wrong)


def unscaled_queries(patch: Patch) -> None:
    """No temperature at all."""
    patch.setattr(
        score_scale.QueryScale,
        "forward",
        lambda self, factor, heads=slice(None): torch.ones_like(factor)[..., None, None],
    )


def factor_of(wrong: Callable[..., Tensor]) -> Callable[[Patch], None]:
    """Another count of keys or positions in the query's factor; nothing kept from before."""

    def plant(patch: Patch) -> None:
        patch.setattr(score_scale, "query_factor", wrong)
        patch.setattr(
            score_scale,
            "_plain_factor",
            lambda scale, window, chunk, *of: wrong(scale, window, chunk, None, *of),
        )

    return plant


query_factor = score_scale.query_factor


def one_late(*args: Any) -> Tensor:
    """The factor of the query before."""
    return query_factor(*args).roll(1, 0)


def unwindowed(scale: Any, window: Any, *args: Any) -> Tensor:
    """Keys counted beyond the window."""
    return query_factor(scale, None, *args)


def through_documents(
    scale: Any, window: Any, chunk: Any, docs: Any, length: int, device: Any
) -> Tensor:
    """Keys and positions counted from the row's start."""
    plain = query_factor(scale, window, chunk, None, length, device)
    return plain if docs is None else plain.expand(-1, docs.starts.shape[0])


def unchunked(scale: Any, window: Any, chunk: Any, *args: Any) -> Tensor:
    """Keys counted beyond the chunk."""
    return query_factor(scale, window, None, *args)


def chunks_of_the_row(patch: Patch) -> None:
    """Chunks that are counted from the row's start, whatever documents there are."""

    def documents_of(self: Any, chunk: Any, batch: int) -> Any:
        if chunk is None or self.documents is None:
            return right(self, chunk, batch)
        place = torch.arange(self.documents.seq, device=self.documents.device)
        return documents.Documents(self.documents.starts.maximum(place // chunk * chunk))

    right = context.SequenceContext.documents_of
    patch.setattr(context.SequenceContext, "documents_of", documents_of)


def no_chunks(patch: Patch) -> None:
    """A window of the chunk's length alone."""
    patch.setattr(
        context.SequenceContext, "documents_of", lambda self, chunk, batch: self.documents
    )


def chunks_of_documents_alone(patch: Patch) -> None:
    """Rows of one document are not cut."""
    right = context.SequenceContext.documents_of

    def documents_of(self: Any, chunk: Any, batch: int) -> Any:
        return None if self.documents is None else right(self, chunk, batch)

    patch.setattr(context.SequenceContext, "documents_of", documents_of)


def one_factor_for_all_windows(patch: Patch) -> None:
    """Kept by kind alone: the second window gets the first one's count."""
    right = documents.Documents.keep

    def keep(self: Any, key: Any, make: Any) -> Any:
        return right(self, key[:1] if key[0] == "query_factor" else key, make)

    patch.setattr(documents.Documents, "keep", keep)


def one_mask_for_all_windows(patch: Patch) -> None:
    """The reference's mask made once per batch."""
    right = documents.Documents.visible

    def visible(self: Any, window: int | None) -> Tensor:
        return self.keep("visible", lambda: right(self, window))

    patch.setattr(documents.Documents, "visible", visible)


def another_heads_factor(patch: Patch) -> None:
    """Each head has the learned scale of the head before."""
    right = score_scale.QueryScale.forward

    def forward(self: Any, factor: Tensor, heads: slice = slice(None)) -> Tensor:
        found = right(self, factor)
        return found if found.shape[2] == 1 else found.roll(-1, 2)[:, :, heads]

    patch.setattr(score_scale.QueryScale, "forward", forward)


def unlearned(patch: Patch) -> None:
    """The learned scale gets no gradient of its last head."""
    right = score_scale.QueryScale.forward

    def forward(self: Any, factor: Tensor, heads: slice = slice(None)) -> Tensor:
        if self.logit_scale is None:
            return right(self, factor, heads)
        learned = torch.cat((self.logit_scale[:-1], self.logit_scale[-1:].detach()))
        return factor[..., None, None] * learned[heads, None]

    patch.setattr(score_scale.QueryScale, "forward", forward)


def normed_over_heads(patch: Patch) -> None:
    """QK-norm over the heads of each dimension."""
    right = norm.QKNormModule._over_head

    def over(self: Any, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return (wide / wide.square().mean(-2, keepdim=True).sqrt() * weight).to(x.dtype)

    assert right
    patch.setattr(norm.QKNormModule, "_over_head", over)


def projection_normed_by_head(patch: Patch) -> None:
    """The mean of each head where that of all is meant."""

    def over(self: Any, q: Tensor, k: Tensor, weights: Any) -> Any:
        return tuple(
            (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight).to(x.dtype)
            for x, weight in zip((q, k), weights, strict=True)
        )

    patch.setattr(norm.QKNormModule, "_over_projection", over)


def unnormed_keys(patch: Patch) -> None:
    """QK-norm of queries alone."""
    right = norm.QKNormModule.forward
    patch.setattr(norm.QKNormModule, "forward", lambda self, q, k: (right(self, q, k)[0], k))


def with_tables(of: Callable[[Any, Rope, int], tuple[RotaryTable, RotaryTable]]) -> Any:
    """q and k by tables of their own."""

    def plant(patch: Patch) -> None:
        right = context.SequenceContext.rotary_table
        asked: dict[int, tuple[Any, Rope, int]] = {}

        def rotary_table(self: Any, rope: Rope, head_dim: int) -> RotaryTable:
            table = right(self, rope, head_dim)
            asked[id(table)] = (self, rope, head_dim)
            return table

        def rotated(q: Tensor, k: Tensor, table: RotaryTable) -> tuple[Tensor, Tensor]:
            of_queries, of_keys = of(*asked[id(table)])
            return rotate(q, of_queries), rotate(k, of_keys)

        patch.setattr(context.SequenceContext, "rotary_table", rotary_table)
        patch.setattr(core_attention, "rotate_both", rotated)

    return plant


def still(table: RotaryTable) -> RotaryTable:
    """Nothing turns."""
    return RotaryTable(torch.ones_like(table.cos), torch.zeros_like(table.sin))


def keys_alone(batch: Any, rope: Rope, head_dim: int) -> Any:
    table = batch.rotary_table(rope, head_dim)
    return still(table), table


def queries_alone(batch: Any, rope: Rope, head_dim: int) -> Any:
    table = batch.rotary_table(rope, head_dim)
    return table, still(table)


def neither(batch: Any, rope: Rope, head_dim: int) -> Any:
    return (still(batch.rotary_table(rope, head_dim)),) * 2


def keys_backwards(batch: Any, rope: Rope, head_dim: int) -> Any:
    table = batch.rotary_table(rope, head_dim)
    return table, RotaryTable(table.cos, -table.sin)


def keys_one_ahead(batch: Any, rope: Rope, head_dim: int) -> Any:
    table = batch.rotary_table(rope, head_dim)
    return table, RotaryTable(table.cos.roll(-1, 0), table.sin.roll(-1, 0))


def other_theta(batch: Any, rope: Rope, head_dim: int) -> Any:
    return (batch.rotary_table(rope.model_copy(update={"theta": rope.theta * 2}), head_dim),) * 2


def unscaled_frequencies(batch: Any, rope: Rope, head_dim: int) -> Any:
    return (batch.rotary_table(rope.model_copy(update={"scaling": None}), head_dim),) * 2


def first_rows_positions(batch: Any, rope: Rope, head_dim: int) -> Any:
    table = batch.rotary_table(rope, head_dim)
    return (RotaryTable(table.cos[:, :1], table.sin[:, :1]),) * 2


def built_with(change: Callable[..., dict[str, Any]]) -> Callable[[Patch], None]:
    """Tables of other positions or frequencies, nothing kept from before."""
    right = RotaryTable.build.__func__  # type: ignore[attr-defined]

    def plant(patch: Patch) -> None:
        names = ("rope", "head_dim", "length", "documents", "device", "dtype")

        def build(cls: Any, *args: Any) -> Any:
            return right(cls, **change(dict(zip(names, args, strict=True))))

        patch.setattr(RotaryTable, "build", classmethod(build))
        patch.setattr(
            context, "plain_table", lambda *args: build(RotaryTable, *args[:3], None, *args[3:])
        )

    return plant


def running_on(how: dict[str, Any]) -> dict[str, Any]:
    """Positions go on through documents."""
    return how | {"documents": None}


def slow_pairs_stand(how: dict[str, Any]) -> dict[str, Any]:
    """Frequencies of another scaling, far beyond the lengths probed."""
    scaling = how["rope"].scaling.model_copy(update={"original_length": 4096})
    return how | {"rope": how["rope"].model_copy(update={"scaling": scaling})}


def turns_all(how: dict[str, Any]) -> dict[str, Any]:
    """The whole head turns where a part of it should."""
    return how | {"rope": how["rope"].model_copy(update={"rotary_fraction": 1.0})}


def no_attention_factor(patch: Patch) -> None:
    """YaRN without its factor."""
    right = RotaryTable.build.__func__  # type: ignore[attr-defined]

    def build(cls: Any, rope: Rope, *args: Any) -> Any:
        made, factor = right(cls, rope, *args), rope.attention_factor()
        return RotaryTable(made.cos / factor, made.sin / factor)

    patch.setattr(RotaryTable, "build", classmethod(build))
    patch.setattr(
        context, "plain_table", lambda *args: build(RotaryTable, *args[:3], None, *args[3:])
    )


def lost_value_gradient(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, kernel: str
) -> Tensor:
    """The last query head gives values no gradient."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    v = torch.cat((v[:, :, :-1], v[:, :, -1:].detach()), dim=2)
    return attend(q, k, v, spec, kernel)


def late_gradient_lost(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, kernel: str) -> Tensor:
    """The last 16 keys have none."""
    kept, last = k[:-16], k[-16:].detach()
    return attend(q, torch.cat((kept, last)), v, spec, kernel)


def neighbours_head(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, kernel: str) -> Tensor:
    """Keys in their groups, values of the other one."""
    return attend(q, k, v.flip(2), spec, kernel)


def later_documents_joined(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, kernel: str
) -> Tensor:
    """Documents beyond the first thousand tokens pass for one."""
    docs = spec.documents
    if docs is not None and docs.seq > 1000:
        starts = torch.where(docs.starts > 1000, 1000, docs.starts)
        spec = replace(spec, documents=documents.Documents(starts))
    return attend(q, k, v, spec, kernel)


def window_of_documents_alone(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, kernel: str
) -> Tensor:
    """The window is off where rows hold documents."""
    if spec.documents is not None:
        assert spec.window is not None
        spec = replace(spec, window=spec.window + 1)
    return attend(q, k, v, spec, kernel)
