"""Configuration of a megahybrid model: every layer has a named scheme."""

from typing import Any

from transformers import PreTrainedConfig


class MegahybridConfig(PreTrainedConfig):
    """A decoder whose layers differ in how they see position.

    `schemes` maps a name to {rotation: {frequencies, attention_factor} or None, window: keys
    visible to a query, its own included, or None for all, qk_norm: {kind, over, weight},
    logit_scale: {kind, ...}}, and where it has them gate: head or element, chunk: tokens of the
    pieces of a text, which do not see each other; `layer_schemes` names one per layer.
    `frequencies` are radians per token, the fp32 values the model was trained with, of pairs
    (i, i + len(frequencies)). `activation` is silu or gelu_tanh, and logits z, times logit_scale,
    become c tanh(z / c) where there is a logit_softcap c.
    """

    model_type = "megahybrid"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 64,
        intermediate_size: int = 128,
        num_hidden_layers: int = 1,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 4,
        head_dim: int = 16,
        block: str = "pre_norm",
        norm: str = "rms",
        norm_eps: float = 1e-5,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        embedding_scale: float = 1.0,
        residual_scale: float = 1.0,
        activation: str = "silu",
        schemes: dict[str, Any] | None = None,
        layer_schemes: list[str] | None = None,
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.block = block
        self.norm = norm
        self.norm_eps = norm_eps
        self.logit_scale = logit_scale
        self.logit_softcap = logit_softcap
        self.embedding_scale = embedding_scale
        self.residual_scale = residual_scale
        self.activation = activation
        self.schemes = schemes or {}
        self.layer_schemes = layer_schemes or []
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def layers(self) -> list[dict[str, Any]]:
        """Return one scheme per layer, first layer first."""
        return [self.schemes[name] for name in self.layer_schemes]

    def windows(self) -> list[int | None]:
        """Return the keys that each layer's cache must reach: its window, or its chunk."""
        return [scheme.get("chunk") or scheme["window"] for scheme in self.layers()]
