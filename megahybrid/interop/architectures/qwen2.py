"""Qwen2 and Qwen2.5: the layers of Qwen3, with biases of queries, keys and values, no QK-norm."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megahybrid.config.attention import AttentionScheme, Bias
from megahybrid.interop.architectures.base import NO_QK_NORM
from megahybrid.interop.architectures.qwen3 import Qwen3


class Qwen2(Qwen3):
    """A window by layer_types, and only with use_sliding_window true."""

    name = "Qwen2"
    model_type = "qwen2"
    serves = replace(Qwen3.serves, qk_norms=(NO_QK_NORM,), biases=("qkv",))

    def export_rank(self, schemes: Sequence[AttentionScheme]) -> int:
        """Return the place among classes that support the same model."""
        return 45

    def bias(self, config: Any) -> Bias:
        """Return the biases, which no field of a config tells."""
        return "qkv"
