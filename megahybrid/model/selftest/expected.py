"""What a scheme says, written out once more, in fp64: nothing of the code that trains is used here.

Only the queries asked for are computed: memory is queries × keys × heads.
"""

import math
from collections.abc import Mapping
from typing import assert_never

import torch
from torch import Tensor

from megahybrid.config.attention import AttentionScheme, Bias, Gate, Nope, QKNorm, Rope
from megahybrid.config.score_scale import (
    FixedScale,
    Llama4Scale,
    LogFromScale,
    LogScale,
    PowerScale,
    ScoreScale,
    SqrtDimScale,
    SsmaxScale,
)
from megahybrid.model.selftest.subject import EPS


def expected_output(
    scheme: AttentionScheme,
    heads: tuple[Tensor, Tensor, Tensor],  # q, k, v [seq, rows, heads, head_dim], neither normed
    learned: Mapping[str, Tensor],
    gates: Mapping[str, Tensor],  # at these queries, [queries, rows, its heads, values of each]
    starts: Tensor,  # [rows, seq]
    queries: Tensor,  # indices
) -> Tensor:
    """The attention output of these queries, [queries, rows, heads, head_dim]."""
    outs = [_of_view(view, heads, learned, starts, queries) for view in scheme.views()]
    if scheme.near is None:
        (out,) = outs
    else:
        share = near_share(scheme, heads, learned, gates.get("fuse_gate"))
        out = share * outs[0] + (1 - share) * outs[1]
    return gated(scheme.gate, out, gates.get("output_gate"))


def _of_view(
    scheme: AttentionScheme,
    heads: tuple[Tensor, Tensor, Tensor],
    learned: Mapping[str, Tensor],
    starts: Tensor,
    queries: Tensor,
) -> Tensor:
    q, k, v = biased(scheme.bias, heads, learned)
    q = normed(q, scheme.qk_norm, learned.get("qk_norm.query_weight"))
    k = normed(k, scheme.qk_norm, learned.get("qk_norm.key_weight"))
    positions = torch.arange(starts.shape[1], device=starts.device) - starts
    match scheme.position:
        case Rope() as rope:
            q, k = (rotated(x, positions.T, rope) for x in (q, k))
        case Nope():
            pass
        case other:
            assert_never(other)
    seen = visible_keys(starts, queries, scheme.window, scheme.chunk)
    scale = score_factor(
        scheme.score_scale,
        positions[:, queries].T,
        seen.sum(-1).T,
        learned.get("query_scale.logit_scale"),
        q.shape[-1],
    )
    group = q.shape[2] // k.shape[2]
    owner = torch.tensor([head // group for head in range(q.shape[2])], device=q.device)
    scores = torch.einsum("ibhd,jbhd->bhij", q[queries] * scale[..., None], k[:, :, owner])
    scores = scores.masked_fill(~seen[:, None], -math.inf)
    if scheme.sink:
        # As much as a key of this score takes, of value 0: its share goes nowhere.
        most = scores.amax(-1, keepdim=True).detach()
        sink = (learned["sinks.logits"][:, None, None] - most).exp()
        weights = (scores - most).exp()
        weights = weights / (weights.sum(-1, keepdim=True) + sink)
    else:
        weights = scores.softmax(-1)
    return torch.einsum("bhij,jbhd->ibhd", weights, v[:, :, owner])


def near_share(
    scheme: AttentionScheme,
    heads: tuple[Tensor, Tensor, Tensor],
    learned: Mapping[str, Tensor],
    product: Tensor | None,
) -> Tensor:
    """The share of the near view by head, [..., heads, 1]: 1 or 0 where heads are split."""
    q, k, _ = heads
    if scheme.split is not None:
        group = q.shape[2] // k.shape[2]
        owners = torch.arange(q.shape[2], device=q.device) // group
        return (owners % scheme.split.of < scheme.split.near).double()[:, None]
    assert scheme.fuse is not None
    match scheme.fuse.gate:
        case "fixed":
            return torch.full((1, 1), scheme.fuse.initial, dtype=torch.float64, device=q.device)
        case "head":
            return 1 / (1 + (-learned["fuse_gate.bias"]).exp())[:, None]
        case "token":
            assert product is not None
            return 1 / (1 + (-product - learned["fuse_gate.bias"][:, None]).exp())
        case other:
            assert_never(other)


def biased(
    bias: Bias, heads: tuple[Tensor, Tensor, Tensor], learned: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [seq, rows, heads, head_dim], each plus its bias [heads * head_dim]."""
    match bias:
        case "none":
            return heads
        case "qkv":
            q, k, v = heads
            of_q, of_k, of_v = (learned[f"biases.{name}"] for name in ("query", "key", "value"))
            return (
                q + of_q.view(q.shape[2:]),
                k + of_k.view(k.shape[2:]),
                v + of_v.view(v.shape[2:]),
            )
        case other:
            assert_never(other)


def gated(gate: Gate, out: Tensor, value: Tensor | None) -> Tensor:
    """The output of heads under a gate of this value, [..., heads, 1 or head_dim]."""
    match gate:
        case "none":
            return out
        case "head" | "element":
            assert value is not None
            return out / (1 + (-value).exp())
        case other:
            assert_never(other)


def visible_keys(
    starts: Tensor, queries: Tensor, window: int | None, chunk: int | None = None
) -> Tensor:
    """[rows, queries, keys]: not later, of the same document, and among the last `window`, or in
    the query's own chunk of the document."""
    key = torch.arange(starts.shape[1], device=starts.device)
    distance = queries[:, None] - key
    seen = (distance >= 0) & (key >= starts[:, queries, None])
    if chunk is not None:
        begins = starts[:, queries, None]
        seen = seen & ((queries[:, None] - begins) // chunk == (key - begins) // chunk)
    return seen if window is None else seen & (distance < window)


def normed(x: Tensor, norm: QKNorm, weight: Tensor | None) -> Tensor:
    """x over the root of its mean square, a head or all heads together, without its mean before
    where the norm is `layernorm`; times the weight."""
    over: tuple[int, ...] = (-2, -1) if norm.over == "projection" else (-1,)
    match norm.kind:
        case "none":
            return x
        case "rms":
            pass
        case "layernorm":
            x = x - x.mean(over, keepdim=True)
        case other:
            assert_never(other)
    x = x / (x.square().mean(over, keepdim=True) + EPS).sqrt()
    if norm.weight == "none":
        return x
    assert weight is not None
    return x * weight.view(-1, x.shape[-1])  # [heads, head_dim], or one for all heads


def angles(positions: Tensor, rope: Rope, head_dim: int) -> Tensor:
    """[..., pairs] in fp32: those of released models, bit for bit."""
    frequencies = rope.frequencies(head_dim, torch, torch.float32).to(positions.device)
    return positions.float()[..., None] * frequencies


def rotated(x: Tensor, positions: Tensor, rope: Rope) -> Tensor:
    """Return x with dimensions i and i + pairs rotated as a pair, and those behind them as they
    are."""
    turn = angles(positions, rope, x.shape[-1])[:, :, None]
    factor, pairs = rope.attention_factor(), turn.shape[-1]
    cos, sin = turn.cos().double() * factor, turn.sin().double() * factor
    first, second, still = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat((first * cos - second * sin, first * sin + second * cos, still), dim=-1)


def score_factor(
    scale: ScoreScale, position: Tensor, keys: Tensor, learned: Tensor | None, head_dim: int
) -> Tensor:
    """Return the factor of q·k, [queries, rows, heads or 1]; `position` and the number of `keys`
    seen are [queries, rows]."""
    match scale:
        case FixedScale():
            return torch.full_like(position, 1, dtype=torch.float64)[..., None] * scale.scale
        case SqrtDimScale():
            factor = torch.ones_like(position, dtype=torch.float64)[..., None]
        case Llama4Scale():
            steps = (position + scale.offset) // scale.floor
            factor = 1 + scale.coefficient * (1 + steps).double().log()[..., None]
        case LogScale():
            factor = (scale.base + keys).double().log()[..., None] / math.log(scale.base)
        case PowerScale():
            factor = ((position + 1).double() / scale.length + 1)[..., None] ** scale.exponent
        case LogFromScale():
            beyond = (keys.double() / scale.length).log().clamp(min=0)
            factor = 1 + scale.coefficient * beyond[..., None]
        case SsmaxScale():
            assert learned is not None
            factor = keys.double().log()[..., None] * learned
        case _:
            assert_never(scale)
    return factor / math.sqrt(head_dim)
