"""A megahybrid model for transformers: one causal decoder, a scheme per layer.

Attention is torch's, over blocks of queries and the keys their window reaches, so that a long
prompt needs no mask of its whole square. The cache of a windowed layer holds window - 1 keys.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .cache_megahybrid import CACHE_NAME, CACHE_NAMES, check_mask, given_cache, windowed
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


class MegahybridMLP(nn.Module):
    """down(activation(gate) * up)."""

    def __init__(self, config: MegahybridConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, seq, hidden] -> the same."""
        gate = self.gate_proj(x)
        tanh = self.activation == "gelu_tanh"
        active = F.gelu(gate, approximate="tanh") if tanh else F.silu(gate)
        return self.down_proj(active * self.up_proj(x))


class MegahybridDecoderLayer(nn.Module):
    """pre_norm x + f(norm(x)) · post_norm x + norm(f(x)) · sandwich x + norm(f(norm(x))) ·
    parallel one norm, x + attn + mlp."""

    input_layernorm: MegahybridNorm
    post_attention_layernorm: MegahybridNorm
    post_feedforward_layernorm: MegahybridNorm
    pre_mlp_layernorm: MegahybridNorm
    post_mlp_layernorm: MegahybridNorm

    def __init__(self, config: MegahybridConfig, layer: int) -> None:
        super().__init__()
        self.block, self.scale = config.block, config.residual_scale
        self.self_attn = MegahybridAttention(config, layer)
        self.mlp = MegahybridMLP(config)
        names = {
            "parallel": ("input_layernorm",),
            "pre_norm": ("input_layernorm", "post_attention_layernorm"),
            "post_norm": ("post_attention_layernorm", "post_feedforward_layernorm"),
            "sandwich": (
                "input_layernorm",
                "post_attention_layernorm",
                "pre_mlp_layernorm",
                "post_mlp_layernorm",
            ),
        }[config.block]
        for name in names:
            norm = MegahybridNorm((config.hidden_size,), config.norm, config.norm_eps)
            setattr(self, name, norm)

    def forward(self, hidden: Tensor, places: Places, cache: Cache | None) -> Tensor:
        """[batch, seq, hidden] -> the same."""
        if self.block == "parallel":
            normed = self.input_layernorm(hidden)
            if self.scale == 1:
                return hidden + self.self_attn(normed, places, cache) + self.mlp(normed)
            return self._added(hidden, self.self_attn(normed, places, cache) + self.mlp(normed))
        if self.block == "pre_norm":
            branch = self.self_attn(self.input_layernorm(hidden), places, cache)
            hidden = self._added(hidden, branch)
            return self._added(hidden, self.mlp(self.post_attention_layernorm(hidden)))
        if self.block == "sandwich":
            branch = self.self_attn(self.input_layernorm(hidden), places, cache)
            hidden = self._added(hidden, self.post_attention_layernorm(branch))
            branch = self.mlp(self.pre_mlp_layernorm(hidden))
            return self._added(hidden, self.post_mlp_layernorm(branch))
        branch = self.self_attn(hidden, places, cache)
        hidden = self._added(hidden, self.post_attention_layernorm(branch))
        return self._added(hidden, self.post_feedforward_layernorm(self.mlp(hidden)))

    def _added(self, hidden: Tensor, branch: Tensor) -> Tensor:
        return hidden + (branch if self.scale == 1 else branch * self.scale)


class MegahybridPreTrainedModel(PreTrainedModel):
    """The base by which transformers makes and loads a model."""

    config_class = MegahybridConfig
    base_model_prefix = "model"
    _no_split_modules = ["MegahybridDecoderLayer"]  # noqa: RUF012
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, MegahybridNorm) and module.weight is not None:
            nn.init.ones_(module.weight)


class MegahybridModel(MegahybridPreTrainedModel):
    """The embedding, the layers and the final norm."""

    def __init__(self, config: MegahybridConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            MegahybridDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = MegahybridNorm((config.hidden_size,), config.norm, config.norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids or inputs_embeds; attention_mask [batch, seen + seq] marks padding with 0.

        `past_key_values` is the name of `cache` before transformers 5.24.
        Hidden states are the embedding, each layer's output, and the last one's after the norm.
        """
        cache = given_cache(cache, past_key_values, kwargs)
        if output_attentions:
            raise ValueError("output_attentions: torch's attention keeps no weights to give.")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
            if self.config.embedding_scale != 1:
                inputs_embeds = inputs_embeds * self.config.embedding_scale
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache or cache is not None:
            cache = windowed(cache, self.config.windows())
        seen = 0 if cache is None else cache.get_seq_length()
        places = self._places(inputs_embeds, attention_mask, position_ids, seen)
        hidden, seen_by = inputs_embeds, [inputs_embeds]
        for layer in self.layers:
            hidden = layer(hidden, places, cache)
            if output_hidden_states:
                seen_by.append(hidden)
        hidden = self.norm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=(*seen_by[:-1], hidden) if output_hidden_states else None,
            **{CACHE_NAME: cache},
        )

    def _places(self, x: Tensor, mask: Tensor | None, position: Tensor | None, seen: int) -> Places:
        batch, seq = x.shape[:2]
        valid = None
        if mask is not None:
            check_mask(mask, seen, seq)
            valid = mask.to(device=x.device, dtype=torch.bool)
            if bool(valid.all()):
                valid = None
        if position is None:
            if valid is None:
                position = torch.arange(seen, seen + seq, device=x.device)[None]
            else:
                position = (valid.long().cumsum(-1) - 1).clamp(min=0)[:, -seq:]
        return Places(seen, seq, position.to(x.device).expand(batch, -1), valid)

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.embed_tokens


class MegahybridForCausalLM(MegahybridPreTrainedModel, GenerationMixin):
    """The model with its head: logits are multiplied by config.logit_scale."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MegahybridConfig) -> None:
        super().__init__(config)
        self.model = MegahybridModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [batch, seq, vocab]; of the last `logits_to_keep` tokens if not 0."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=given_cache(cache, past_key_values, kwargs),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep]) * self.config.logit_scale
        if (cap := self.config.logit_softcap) is not None:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any
    ) -> None:
        """Set windows before the first token: assisted decoding asks these layers to keep more."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *rest)
        for name in CACHE_NAMES:
            if isinstance(cache := model_kwargs.get(name), DynamicCache):
                windowed(cache, self.config.windows())
                if getattr(generation_config, "is_assistant", False):
                    cache.activate_past_recording()
