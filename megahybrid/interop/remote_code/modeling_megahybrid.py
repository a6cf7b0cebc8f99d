"""A megahybrid model for transformers: one causal decoder, a scheme per layer.

The cache of a windowed layer holds window - 1 keys.
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

from .attention_megahybrid import MegahybridAttention, MegahybridNorm, Places
from .cache_megahybrid import CACHE_NAME, CACHE_NAMES, check_mask, given_cache, windowed
from .configuration_megahybrid import MegahybridConfig


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
