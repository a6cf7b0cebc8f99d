"""The fields that version 0.1 knew, so that a digest which it wrote still holds.

A ledger holds digests of run files as 0.1 wrote them. A field that came later has no part in one
where it is at its default, because it does nothing there.
"""

from typing import Any

from megahybrid.config.attention import AttentionScheme, QKNorm, Rope
from megahybrid.config.base import Frozen
from megahybrid.config.model import ModelConfig
from megahybrid.config.parallel import ParallelConfig
from megahybrid.config.run import RunConfig
from megahybrid.config.score_scale import Llama4Scale, LogScale, SsmaxScale
from megahybrid.config.stages import BatchRamp

# In today's words; classes that are not here have got no field since.
FIRST: dict[type[Frozen], frozenset[str]] = {
    RunConfig: frozenset(
        (
            "seed",
            "model",
            "parallel",
            "data",
            "optimizer",
            "stages",
            "checkpoint",
            "evaluate",
            "start",
            "log",
            "kernels",
            "precision",
            "device",
            "deterministic",
            "directory",
            "max_skipped_in_a_row",
        )
    ),
    BatchRamp: frozenset(("start", "end", "increment", "over_tokens")),
    ParallelConfig: frozenset(("tensor", "zero_stage", "offload")),
    ModelConfig: frozenset(
        (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "block",
            "norm",
            "eps",
            "tie_embeddings",
            "logit_scale",
            "initial_std",
            "embedding_std",
            "layer_plan",
        )
    ),
    AttentionScheme: frozenset(("position", "window", "qk_norm", "score_scale")),
    QKNorm: frozenset(("kind", "over", "weight")),
    Rope: frozenset(("kind", "theta", "scaling", "rotary_fraction")),
    Llama4Scale: frozenset(("kind", "floor", "coefficient")),
    LogScale: frozenset(("kind", "base")),
    SsmaxScale: frozenset(("kind", "initial")),
}


def first_fields(value: Any, dumped: Any) -> Any:
    """Return what `dump` made of a value without the fields that came later and are at their
    defaults, at any depth."""
    match value:
        case Frozen():
            fields = type(value).model_fields
            known = FIRST.get(type(value), fields.keys())
            return {
                name: first_fields(getattr(value, name, None), inner)
                for name, inner in dumped.items()
                if name in known or getattr(value, name) != fields[name].default
            }
        case dict():
            return {key: first_fields(inner, dumped[key]) for key, inner in value.items()}
        case list() | tuple():
            return [first_fields(one, inner) for one, inner in zip(value, dumped, strict=True)]
        case _:
            return dumped
