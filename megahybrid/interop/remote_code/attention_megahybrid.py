"""Attention of a megahybrid layer: torch's, over blocks of queries and the keys their window
reaches, so that a long prompt needs no mask of its whole square."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .configuration_megahybrid import MegahybridConfig
from .views_megahybrid import MegahybridFuseGate, fused, split_share

QUERY_BLOCK = 1024


class MegahybridNorm(nn.Module):
    """RMSNorm or bias-free LayerNorm over the last dimension, in fp32."""

    def __init__(self, shape: tuple[int, ...] | None, kind: str, eps: float) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = None if shape is None else nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Return x normalised, of the same shape and dtype."""
        wide = x.float()
        if self.kind == "layernorm":
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide if self.weight is None else wide * self.weight.float()).to(x.dtype)


class Places:
    """The positions of the queries of one forward: made once, used by every layer.

    `position` [batch, seq] counts a row's own tokens, padding left out; `valid` [batch, seen + seq]
    is None where nothing is padded.
    """

    def __init__(self, seen: int, seq: int, position: Tensor, valid: Tensor | None) -> None:
        self.seen, self.seq, self.position, self.valid = seen, seq, position, valid
        self._rotations: dict[str, tuple[Tensor, Tensor]] = {}

    def columns(self, device: torch.device) -> Tensor:
        """Return the position [batch or 1, seen + seq] of each cached and each new token."""
        if self.valid is None:
            return torch.arange(self.seen + self.seq, device=device)[None]
        return (self.valid.long().cumsum(-1) - 1).clamp(min=0)

    def cos_and_sin(
        self, name: str, rotation: dict[str, Any], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return cos and sin [batch, 1, seq, pairs] of a scheme's rotation; angles in fp32."""
        if name not in self._rotations:
            self._rotations[name] = turns(self.position, rotation, dtype)
        return self._rotations[name]


def turns(position: Tensor, rotation: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin [batch, 1, seq, pairs] of a rotation at these positions [batch, seq]."""
    device = position.device
    frequencies = torch.tensor(rotation["frequencies"], dtype=torch.float32, device=device)
    angles = position[:, None, :, None].float() * frequencies
    factor = rotation["attention_factor"]
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [batch, heads, seq, head_dim] with its first 2 * pairs dimensions rotated."""
    pairs = cos.shape[-1]
    a, b, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


class MegahybridAttention(nn.Module):
    """The attention of one layer, by its scheme, with a cache."""

    def __init__(self, config: MegahybridConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.name = layer, config.layer_schemes[layer]
        self.scheme = config.schemes[self.name]
        self.head_dim = config.head_dim
        hidden, heads, kv_heads = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        self.groups = heads // kv_heads
        bias = self.scheme.get("bias", "none") == "qkv"
        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=False)
        if self.scheme.get("sink", False):
            self.sinks = nn.Parameter(torch.zeros(heads))
        self.gate = self.scheme.get("gate", "none")
        if self.gate != "none":
            features = heads if self.gate == "head" else heads * self.head_dim
            self.gate_proj = nn.Linear(hidden, features, bias=False)
        self.near = self.scheme.get("near")
        if "fuse" in self.scheme:
            self.fuse_gate = MegahybridFuseGate(self.scheme["fuse"], hidden, heads)
        self.qk_norm = self.scheme["qk_norm"]
        if self.qk_norm["kind"] != "none":
            self.q_norm = self._norm(heads, config.norm_eps)
            self.k_norm = self._norm(kv_heads, config.norm_eps)
        if self.scheme["logit_scale"]["kind"] == "ssmax":
            self.logit_scale = nn.Parameter(torch.ones(heads))

    def _norm(self, heads: int, eps: float) -> MegahybridNorm:
        if self.qk_norm["weight"] == "none":
            return MegahybridNorm(None, self.qk_norm["kind"], eps)
        if self.qk_norm["over"] == "projection":
            shape: tuple[int, ...] = (heads * self.head_dim,)
        elif self.qk_norm["weight"] == "per_head":
            shape = (heads, self.head_dim)
        else:
            shape = (self.head_dim,)
        return MegahybridNorm(shape, self.qk_norm["kind"], eps)

    def forward(self, hidden: Tensor, places: Places, cache: Cache | None) -> Tensor:
        """[batch, seq, hidden] -> the same."""
        q, k, v = self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)
        split = (-1, self.head_dim)
        if self.qk_norm["kind"] == "none":
            q, k = q.unflatten(-1, split), k.unflatten(-1, split)
        elif self.qk_norm["over"] == "projection":
            q, k = self.q_norm(q).unflatten(-1, split), self.k_norm(k).unflatten(-1, split)
        else:
            q, k = self.q_norm(q.unflatten(-1, split)), self.k_norm(k.unflatten(-1, split))
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # [batch, heads, seq, head_dim]
        v = v.unflatten(-1, split).transpose(1, 2)
        if self.near is None:
            if self.scheme["rotation"] is not None:
                cos, sin = places.cos_and_sin(self.name, self.scheme["rotation"], q.dtype)
                q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            q, scale = self._scaled(q, places, self.scheme)
            if cache is not None:
                k, v = cache.update(k, v, self.layer)
            out = self._attend(q, k, v, scale, places, self.scheme)
        else:
            if cache is not None:
                k, v = cache.update(k, v, self.layer)
            near = self._seen_in(self.near, f"{self.name}.near", q, k, v, places)
            far = self._seen_in(self.scheme, self.name, q, k, v, places)
            out = fused(near, far, self._near_share(hidden, q, k))
        out = out.transpose(1, 2)  # [batch, seq, heads, head_dim]
        if self.gate != "none":
            # One value a head, or one for each of its elements.
            gate = self.gate_proj(hidden).unflatten(-1, (out.shape[2], -1))
            exact = gate.to(torch.promote_types(gate.dtype, torch.float32))
            out = out * exact.sigmoid().to(out.dtype)
        return self.o_proj(out.flatten(2))

    def _seen_in(
        self, view: dict[str, Any], name: str, q: Tensor, k: Tensor, v: Tensor, places: Places
    ) -> Tensor:
        """Return the output of one of two views; k holds all cached keys, not rotated."""
        if view["rotation"] is not None:
            q = rotate(q, *places.cos_and_sin(name, view["rotation"], q.dtype))
            columns = places.columns(k.device)[:, -k.shape[2] :]
            k = rotate(k, *turns(columns, view["rotation"], k.dtype))
        q, scale = self._scaled(q, places, view)
        return self._attend(q, k, v, scale, places, view)

    def _near_share(self, hidden: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Return the share of the near view, [batch or 1, heads or 1, seq or 1, 1]."""
        if "fuse" in self.scheme:
            share: Tensor = self.fuse_gate(hidden)
            return share
        return split_share(self.scheme["split"], q.shape[1], k.shape[1], q)

    def _scaled(self, q: Tensor, places: Places, view: dict[str, Any]) -> tuple[Tensor, float]:
        """Return q times the factor that depends on its position, and the scale of every score."""
        scale = view["logit_scale"]
        kind = scale["kind"]
        if kind == "fixed":
            return q, scale["scale"]
        plain = self.head_dim**-0.5
        if kind == "sqrt_dim":
            return q, plain
        position = places.position[:, None, :, None]
        if kind == "llama4":
            steps = (position + scale.get("offset", 1)) // scale["floor"]
            factor = 1 + scale["coefficient"] * torch.log1p(steps.float())
        elif kind == "power":
            factor = (1 + (position + 1).float() / scale["length"]) ** scale["exponent"]
        else:
            chunk = view.get("chunk")
            keys = position + 1 if chunk is None else position % chunk + 1
            if view["window"] is not None:
                keys = keys.clamp(max=view["window"])
            if kind == "log":
                base = torch.tensor(float(scale["base"]), device=q.device)
                factor = torch.log(scale["base"] + keys.float()) / torch.log(base)
            elif kind == "log_from":
                ratio = (keys.float() / scale["length"]).clamp(min=1)
                factor = 1 + scale["coefficient"] * torch.log(ratio)
            else:
                factor = torch.log(keys.float()) * self.logit_scale.float()[:, None, None]
        return q * factor.to(q.dtype), plain

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        places: Places,
        view: dict[str, Any],
    ) -> Tensor:
        """Return the softmax average over the visible keys, a block of queries at a time."""
        k, v = k.repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1)
        chunk = view.get("chunk")
        window = view["window"] if chunk is None else chunk
        total = places.seen + places.seq
        first = total - k.shape[2]  # the place of the oldest key that is held
        parts = []
        for start in range(0, places.seq, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, places.seq)
            low = first
            if window is not None:
                low = max(first, places.seen + start - window + 1)
            high = places.seen + stop
            query = torch.arange(places.seen + start, high, device=q.device)[:, None]
            key = torch.arange(low, high, device=q.device)[None]
            mask = key <= query
            if window is not None:
                mask = mask & (key > query - window)
            if chunk is not None:
                pieces = places.columns(q.device) // chunk
                queries = pieces[:, places.seen + start : high, None]
                mask = (mask & (queries == pieces[:, None, low:high]))[:, None]
            if places.valid is not None:
                # A padded query sees itself: a row of softmax must have something in it.
                mask = mask & places.valid[:, None, None, low:high] | (key == query)
            held = slice(low - first, high - first)
            attend: Any = F.scaled_dot_product_attention
            if self.scheme.get("sink", False):
                attend = self._attend_with_sinks
            parts.append(
                attend(
                    q[:, :, start:stop],
                    k[:, :, held],
                    v[:, :, held],
                    attn_mask=mask,
                    scale=scale,
                )
            )
        return torch.cat(parts, dim=2)

    def _attend_with_sinks(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, scale: float
    ) -> Tensor:
        """Return the average where a learned score of each head takes weight and has no value."""
        exact = torch.promote_types(q.dtype, torch.float32)
        scores = (q.to(exact) * scale) @ k.to(exact).mT
        scores = scores.masked_fill(~attn_mask, -torch.inf)
        sinks = self.sinks.to(exact)[:, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
        return (weights @ v.to(exact)).to(v.dtype)
