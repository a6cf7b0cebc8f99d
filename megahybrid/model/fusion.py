"""Attention of a layer with two views of the same queries, keys and values.

near and far have a position, a window and a temperature each; far is the scheme itself. Fused,
every head has both, o = g * near + (1 - g) * far, in exactly this form: g = 1 is the near scheme
and g = 0 the far one, bit for bit on every kernel. Because v is shared, o is attention under the
one distribution g * p_near + (1 - g) * p_far. Split, a head has one of the two.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from megahybrid.config.attention import AttentionScheme, rotation_of
from megahybrid.config.context_plan import SplitPart
from megahybrid.config.fusion import Fuse, HeadSplit, learned_fuse
from megahybrid.config.model import ModelConfig
from megahybrid.model.attention import Attention, Positions, kv_rows
from megahybrid.model.context import Met, SequenceContext, View
from megahybrid.model.context_attention import (
    ShardedCall,
    attend_sharded_views,
    own_tokens,
    whole_rows,
)
from megahybrid.model.kernels.chosen import kernels_of_views
from megahybrid.model.rotary import RotaryTable
from megahybrid.model.score_scale import QueryScale
from megahybrid.parallel.linear import sharded_parameter
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.parallel.sharding import Segment

Output = Float[Tensor, "seq batch heads_local head_dim"]


def fused_output(near: Output, far: Output, share: Float[Tensor, "*tokens heads 1"]) -> Output:
    """Return share * near + (1 - share) * far, computed in the share's dtype: fp32 or better."""
    out: Tensor = _Fused.apply(near, far, share)
    return out


class _Fused(torch.autograd.Function):
    """Written out because autograd's version keeps both products and both outputs in fp32 beside
    the two tensors that the kernels keep anyway."""

    @staticmethod
    def forward(ctx: Any, near: Tensor, far: Tensor, share: Tensor) -> Tensor:
        ctx.save_for_backward(near, far, share)
        return (share * near + (1 - share) * far).to(near.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        (near, far, share), grad = ctx.saved_tensors, grads[0]
        of_share = None
        if ctx.needs_input_grad[2]:
            # One value for each token and head; of all tokens where they have the same share.
            each = (grad * (near - far)).sum(-1, keepdim=True, dtype=share.dtype)
            of_share = each.sum_to_size(share.shape)
        return (share * grad).to(near.dtype), ((1 - share) * grad).to(far.dtype), of_share


class FuseGate(nn.Module):
    """The share g of the near view: sigmoid(w u + b) by token and head, sigmoid(b) by head, or one
    number. w u is one more output of the input projection; b is cut with the heads."""

    bias: nn.Parameter | None

    def __init__(self, fuse: Fuse, num_heads: int, name: str, mesh: ParallelMesh) -> None:
        super().__init__()
        self.fuse, self.bias = fuse, None
        if learned_fuse(fuse.gate):
            segment = Segment(f"{name}.fuse_gate.bias", (num_heads,), 0)
            self.bias = sharded_parameter((segment,), mesh)

    def forward(self, like: Tensor, product: Tensor | None, heads: slice = slice(None)) -> Tensor:
        """g [..., heads or 1, 1], in fp32 or better, on the device of `like`; `product` is w u
        [seq, batch, heads], None where there is no w. `heads` of this rank's are asked for."""
        exact = torch.promote_types(like.dtype, torch.float32)
        if self.bias is None:
            return torch.full((1, 1), self.fuse.initial, dtype=exact, device=like.device)
        score = self.bias[heads].to(exact)
        if product is not None:
            score = product.to(exact) + score
        return score.sigmoid()[..., None]


class NearView(Attention):
    """The near view of a layer: what its heads become, without parameters of its own."""

    def __init__(
        self, name: str, config: ModelConfig, scheme: AttentionScheme, mesh: ParallelMesh
    ) -> None:
        nn.Module.__init__(self)
        self.scheme, self.head_dim, self.kernel = scheme, config.head_dim, "auto"
        self.compiled_prepare = None
        self.sinks = None  # two views go without: `views_problem` refuses them together
        self.split: HeadSplit | None = None
        self.query_scale = QueryScale.of(scheme, config.num_heads, f"{name}.near", mesh)

    @property
    def part(self) -> SplitPart | None:
        """The near heads of a layer whose heads are split."""
        if self.split is None:
            return None
        return SplitPart(self.scheme.reach, self.split, True)


class _Stretch(NamedTuple):
    """Key heads next to one another that are of the same view."""

    near: bool
    start: int
    stop: int


class TwoViews(Attention):
    """Attention whose heads see their keys in two ways; what stands in `Attention` is the far one.

    Heads come raw to `attended`: what is prepared for one view is not what the other needs.
    """

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        scheme: AttentionScheme,
        mesh: ParallelMesh,
        kernel: str,
    ) -> None:
        super().__init__(name, config, scheme, mesh, kernel)
        self.near = NearView(name, config, scheme.views()[0], mesh)
        fuse = scheme.fuse
        self.fuse_gate = None if fuse is None else FuseGate(fuse, config.num_heads, name, mesh)
        keep = kv_rows(config, mesh.tensor)
        local = max(1, config.num_kv_heads // mesh.tensor.size)
        first = mesh.tensor.rank * local if keep is None else keep[0] // config.head_dim
        self.kv_heads = range(first, first + local)  # of this rank, among those of the model
        self._take_views(kernel)

    def adopt(self, scheme: AttentionScheme, kernel: str) -> None:
        """See as `scheme` says from the next forward on, in both views."""
        super().adopt(scheme, kernel)
        self.near.adopt(scheme.views()[0], kernel)
        self._take_views(kernel)

    def _take_views(self, kernel: str) -> None:
        self.near.kernel, self.kernel = kernels_of_views(kernel)
        self.near.split = self.scheme.split

    @property
    def part(self) -> SplitPart | None:
        """The far heads where they are split."""
        split = self.scheme.split
        return None if split is None else SplitPart(self.scheme.reach, split, False)

    def positions(self, context: SequenceContext) -> Positions:
        """Return nothing: `attended` asks for those of each view."""
        return Positions(None, None)

    def prepared(
        self, q: Tensor, k: Tensor, positions: Positions, heads: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Return q and k as they are: `attended` prepares them for each view."""
        return q, k

    def attended(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: SequenceContext,
        fuse_gate: Tensor | None = None,
    ) -> Output:
        """The attention output of raw heads; `fuse_gate` [seq, batch, heads] where a share depends
        on the token."""
        if context.watch is not None:
            self._tell(q, k, context, fuse_gate)
            context = replace(context, watch=None)
        if context.shards is not None and self.scheme.split is None:
            return self._over_ranks(q, k, v, context, fuse_gate)
        near_qk = self._prepared(self.near, q, k, context)
        far_qk = self._prepared(self, q, k, context)
        if context.two_views is not None:
            share = self._share(q, fuse_gate)
            views = [
                View(query, view.spec(context, q.shape[1]).scale, scheme)
                for view, scheme, (query, _) in zip(
                    (self.near, self), self.scheme.views(), (near_qk, far_qk), strict=True
                )
            ]
            return fused_output(*context.two_views(views, k, v, share), share)
        if self.scheme.split is not None:
            return self._split(self.scheme.split, near_qk, far_qk, v, context)
        near = self.near_attention(*near_qk, v, context)
        far = super().attended(*far_qk, v, context)
        return fused_output(near, far, self._share(q, fuse_gate))

    def near_attention(self, q: Tensor, k: Tensor, v: Tensor, context: SequenceContext) -> Output:
        """The attention output of heads that are prepared for the near view."""
        return self.near.attended(q, k, v, context)

    def _prepared(
        self,
        view: Attention,
        q: Tensor,
        k: Tensor,
        context: SequenceContext,
        heads: slice = slice(None),
    ) -> tuple[Tensor, Tensor]:
        view.compiled_prepare = self.compiled_prepare
        return Attention.prepared(view, q, k, Attention.positions(view, context), heads)

    def _over_ranks(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: SequenceContext,
        fuse_gate: Tensor | None,
    ) -> Output:
        """The attention output of fused views where rows lie on context ranks. Keys and values are
        sent once, as they are: rotated keys beside them would be half as many bytes more, and the
        rank that receives keys knows their positions."""
        shards, views = context.shards, (self.near, self)
        assert shards is not None
        if shards.exchange(self.scheme.reach) == "heads":
            some = whole_rows(q, k, v, shards, fuse_gate)
            near, far = (
                Attention.attended(
                    view,
                    *self._prepared(view, some.q, some.k, context.of_whole_rows(), some.heads),
                    some.v,
                    context.of_whole_rows(),
                )
                for view in views
            )
            share = self._share(some.q, some.gates, some.heads)
            return own_tokens(fused_output(near, far, share), shards)
        queries = [self._prepared(view, q, k, context)[0] for view in views]
        calls = [self._call(view, context, q.shape[1]) for view in views]
        near, far = attend_sharded_views(queries, k, v, calls)
        return fused_output(near, far, self._share(q, fuse_gate))

    def _call(self, view: Attention, context: SequenceContext, batch: int) -> ShardedCall:
        """What a view asks of attention over ranks, for keys that come unrotated."""
        assert context.shards is not None
        spec, rope = view.spec(context, batch), rotation_of(view.scheme.position)
        call = ShardedCall(context.shards, spec, view.kernel, context.attention)
        if rope is None:
            return call

        def table(first: int, last: int) -> RotaryTable:
            if spec.window is not None:
                return context.rotary_table(rope, self.head_dim, (first, last))
            whole = context.rotary_table(rope, self.head_dim, (0, context.length))
            return whole.stretch(first, last)

        return replace(call, rotation=table)

    def _tell(
        self, q: Tensor, k: Tensor, context: SequenceContext, fuse_gate: Tensor | None
    ) -> None:
        """Tell who watches how the queries meet the keys of each view."""
        assert context.watch is not None
        met = [
            Met(*self._prepared(view, q, k, context), view.spec(context, q.shape[1]))
            for view in (self.near, self)
        ]
        context.watch(met, self._share(q, fuse_gate))

    def _share(self, q: Tensor, fuse_gate: Tensor | None, heads: slice = slice(None)) -> Tensor:
        """The share of the near view; of split heads 1 or 0. q are `heads` of this rank's."""
        if self.fuse_gate is not None:
            share: Tensor = self.fuse_gate(q, fuse_gate, heads)
            return share
        split, group = self.scheme.split, q.shape[2] // len(self.kv_heads)
        assert split is not None
        flags = [float(split.is_near(head)) for head in self.kv_heads for _ in range(group)]
        exact = torch.promote_types(q.dtype, torch.float32)
        return torch.tensor(flags, dtype=exact, device=q.device)[:, None]

    def _split(
        self,
        split: HeadSplit,
        near_qk: tuple[Tensor, Tensor],
        far_qk: tuple[Tensor, Tensor],
        v: Tensor,
        context: SequenceContext,
    ) -> Output:
        """Each view with its own heads, and these in their order again."""
        stretches, group = self._stretches(split), near_qk[0].shape[2] // v.shape[2]
        found = {}
        for near, (q, k) in ((True, near_qk), (False, far_qk)):
            own = [stretch for stretch in stretches if stretch.near == near]
            if own:
                heads = _heads(q, own, group), _heads(k, own), _heads(v, own)
                out = (
                    self.near_attention(*heads, context)
                    if near
                    else super().attended(*heads, context)
                )
                sizes = [(stretch.stop - stretch.start) * group for stretch in own]
                found[near] = iter(out.split(sizes, dim=2))
        return torch.cat([next(found[stretch.near]) for stretch in stretches], dim=2)

    def _stretches(self, split: HeadSplit) -> list[_Stretch]:
        found: list[_Stretch] = []
        for index, head in enumerate(self.kv_heads):
            near = split.is_near(head)
            if found and found[-1].near == near:
                found[-1] = found[-1]._replace(stop=index + 1)
            else:
                found.append(_Stretch(near, index, index + 1))
        return found


def _heads(x: Tensor, stretches: list[_Stretch], group: int = 1) -> Tensor:
    """[seq, batch, heads of these stretches, head_dim]; `group` query heads share a key head."""
    parts = [x[:, :, group * one.start : group * one.stop] for one in stretches]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
