"""The base of the classes that transformers ships: what their configs have in common."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megahybrid.config.attention import AttentionScheme, Bias, Gate, QKNorm
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig
from megahybrid.config.parsing import parse
from megahybrid.errors import InteropError
from megahybrid.interop.architectures.base import Architecture
from megahybrid.interop.architectures.layers import Layer, plan_of
from megahybrid.interop.architectures.rope import Fields, head_dim_of

# What must have this value, where a config has the field at all.
PLAIN_FIELDS = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
}


class StockArchitecture(Architecture):
    """A class of one block and one norm that transformers ships: it goes out and comes in."""

    plain_fields: ClassVar[Mapping[str, Any]] = PLAIN_FIELDS

    @abstractmethod
    def layer_fields(self, model: ModelConfig, schemes: Sequence[AttentionScheme]) -> Fields:
        """Return the fields of config.json for the layers, given one scheme per layer, and any that
        only this class has."""

    @abstractmethod
    def layers_of(self, config: Any) -> list[Layer]:
        """Return the position and window of each layer of a config."""

    def qk_norm(self, config: Any) -> QKNorm:
        """Return the QK-norm of a config."""
        (norm,) = self.serves.qk_norms
        return norm

    def score_scale(self, config: Any) -> Fields:
        """Return the scale of the scores of a config."""
        return {"kind": "sqrt_dim"}

    def gate(self, config: Any) -> Gate:
        """Return the gate of a config."""
        return "none"

    def bias(self, config: Any) -> Bias:
        """Return the biases of the projections of a config."""
        return "none"

    def layer_extras(self, config: Any) -> Sequence[Fields]:
        """Return, for each layer of a config, the fields of its scheme that not every layer has;
        nothing where there are none."""
        return ()

    def intermediate_size(self, config: Any) -> int:
        """Return the width of the MLP of a config."""
        return int(config.intermediate_size)

    def logit_scale(self, config: Any) -> float:
        """Return the factor on the logits of a config."""
        return 1.0

    def function_of(self, config: Any) -> Fields:
        """Return the fields of our model beside its sizes and layers that a config sets."""
        return {}

    def own_fields(self, model: ModelConfig, plan: LayerPlan) -> Fields:
        """Return the fields that every class of transformers has, then those of the layers."""
        fields: Fields = {
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
        }
        fields["layer_norm_eps" if model.norm == "layernorm" else "rms_norm_eps"] = model.eps
        return fields | self.layer_fields(model, plan.expand())

    def from_config(self, config: Any) -> ModelConfig:
        """Return the model of a config, or raise, as Architecture describes it."""
        for field, value in self.plain_fields.items():
            found = getattr(config, field, value)
            if found != value:
                raise InteropError(
                    f"config.json: {field}={found} is not supported by our model (only {value})."
                )
        if getattr(config, "quantization_config", None) is not None:
            raise InteropError("config.json: its weights are quantized. Ask for unquantized ones.")
        heads = config.num_attention_heads
        (block,), (norm,) = self.serves.blocks, self.serves.norms
        head_dim = head_dim_of(config)
        layers = self.layers_of(config)
        model: Fields = {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": self.intermediate_size(config),
            "num_heads": heads,
            "num_kv_heads": config.num_key_value_heads or heads,
            "head_dim": head_dim,
            "block": block,
            "norm": norm,
            "eps": float(_eps(config)),
            "tie_embeddings": bool(config.tie_word_embeddings),
            "initial_std": float(config.initializer_range) or 0.02,
            "layer_plan": plan_of(
                layers,
                self.qk_norm(config),
                self.score_scale(config),
                gate=self.gate(config),
                bias=self.bias(config),
                own=self.layer_extras(config),
            ),
            "logit_scale": self.logit_scale(config),
            **self.function_of(config),
        }
        return parse(ModelConfig, model, where="model")


def _eps(config: Any) -> float:
    return config.layer_norm_eps if hasattr(config, "layer_norm_eps") else config.rms_norm_eps
