"""The Hugging Face name of each of our tensors, and the order in which a class keeps a head's rows.

Inside our model a rotation has the pairs (i, i + rotary_dim / 2). Cohere's classes have
(2i, 2i + 1); and a rotation of part of a head, written as `proportional`, has pairs of the whole
head. Queries and keys of rotated layers are reordered for them; a layer without rotation keeps its
order, because there any order that queries and keys share gives the same scores.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import assert_never

from megahybrid.config.attention import (
    AttentionScheme,
    QKNorm,
    biased_projections,
    gate_shape,
)
from megahybrid.config.fusion import fuse_shapes
from megahybrid.config.model import ModelConfig
from megahybrid.config.score_scale import (
    FixedScale,
    Llama4Scale,
    LogFromScale,
    LogScale,
    PowerScale,
    SqrtDimScale,
    SsmaxScale,
)

HEAD = "lm_head.weight"  # where it is not the embedding
Order = tuple[int, ...]


@dataclass(frozen=True)
class TensorName:
    """One tensor under both names; `order` is None, or for each of their rows of a head the one of
    ours. `ours` is None for a tensor that only they have, filled with `constant`. `offset` is what
    they add to each number before they use it."""

    ours: str | None
    theirs: str
    shape: tuple[int, ...]
    order: Order | None = None
    constant: float = 0.0
    offset: float = 0.0

    @property
    def in_last_dimension(self) -> bool:
        """True where `order` is of the last dimension: a QK-norm's weight of one row per head."""
        return self.ours is not None and self.ours.endswith("_norm.weight") and len(self.shape) > 1


def is_norm(ours: str) -> bool:
    """True for the weight of a norm, of the residual stream or of queries and keys."""
    return ours.endswith("norm.weight")


def norm_names(model: ModelConfig) -> Mapping[str, str]:
    """Return the name of each norm of a block, as every class so far has it, by ours."""
    match model.block:
        case "parallel":
            return {"norm": "input_layernorm"}
        case "pre_norm":
            return {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
        case "post_norm":
            return {
                "attention_norm": "post_attention_layernorm",
                "mlp_norm": "post_feedforward_layernorm",
            }
        case "sandwich":
            return {
                "attention_norm": "input_layernorm",
                "attention_output_norm": "post_attention_layernorm",
                "mlp_norm": "pre_mlp_layernorm",
                "mlp_output_norm": "post_mlp_layernorm",
            }
        case _:
            assert_never(model.block)


def half_pairs(head_dim: int, rotary_dim: int) -> Order | None:
    """Return our row for each of theirs where pairs are (i, i + head_dim / 2), also for a part of a
    head; None where the orders agree."""
    pairs = rotary_dim // 2
    still = list(range(rotary_dim, head_dim))
    fill = head_dim // 2 - pairs
    order = [*range(pairs), *still[:fill], *range(pairs, rotary_dim), *still[fill:]]
    return None if order == list(range(head_dim)) else tuple(order)


def interleaved_pairs(head_dim: int, rotary_dim: int) -> Order | None:
    """Return our row for each of theirs where pairs are (2i, 2i + 1); None where the orders
    agree."""
    pairs = rotary_dim // 2
    still = list(range(rotary_dim, head_dim))
    order = [row for pair in range(pairs) for row in (pair, pairs + pair)] + still
    return None if order == list(range(head_dim)) else tuple(order)


def attention_tensors(
    model: ModelConfig, scheme: AttentionScheme, ours: str, theirs: str, order: Order | None
) -> Iterator[TensorName]:
    """Yield the projections and their biases, the sinks, the QK-norm, the gate and the learned
    scale of one layer."""
    hidden, head_dim = model.hidden_size, model.head_dim
    heads = {"query": model.num_heads, "key": model.num_kv_heads, "value": model.num_kv_heads}
    for name, count in heads.items():
        yield TensorName(
            f"{ours}.attention.{name}.weight",
            f"{theirs}.{name[0]}_proj.weight",
            (count * head_dim, hidden),
            None if name == "value" else order,
        )
    for name in biased_projections(scheme.bias):
        yield TensorName(
            f"{ours}.attention.{name}.bias",
            f"{theirs}.{name[0]}_proj.bias",
            (heads[name] * head_dim,),
            None if name == "value" else order,
        )
    if scheme.sink:
        yield TensorName(f"{ours}.attention.sinks", f"{theirs}.sinks", (model.num_heads,))
    yield TensorName(
        f"{ours}.attention.output.weight",
        f"{theirs}.o_proj.weight",
        (hidden, model.num_heads * head_dim),
    )
    for name in ("query", "key"):
        shape = _qk_norm_shape(scheme.qk_norm, heads[name], head_dim)
        if shape is not None:
            yield TensorName(
                f"{ours}.attention.{name}_norm.weight",
                f"{theirs}.{name[0]}_norm.weight",
                shape,
                order,
            )
    gate = gate_shape(scheme.gate, model.num_heads, model.num_kv_heads, head_dim)
    if gate is not None:
        yield TensorName(
            f"{ours}.attention.output_gate.weight",
            f"{theirs}.gate_proj.weight",
            (gate.values, hidden),
        )
    if scheme.fuse is not None:
        for name, shape in fuse_shapes(scheme.fuse.gate, model.num_heads, hidden).items():
            yield TensorName(
                f"{ours}.attention.fuse_gate.{name}", f"{theirs}.fuse_gate.{name}", shape
            )
    match scheme.score_scale:
        case SsmaxScale():
            yield TensorName(
                f"{ours}.attention.logit_scale", f"{theirs}.logit_scale", (model.num_heads,)
            )
        case SqrtDimScale() | FixedScale():
            pass
        case Llama4Scale() | PowerScale() | LogScale() | LogFromScale():
            pass
        case _:
            assert_never(scheme.score_scale)


def _qk_norm_shape(norm: QKNorm, heads: int, head_dim: int) -> tuple[int, ...] | None:
    """Return the shape of the weight of one of the two norms, None without a norm."""
    match norm.kind:
        case "none":
            return None
        case "rms" | "layernorm":
            pass
        case _:
            assert_never(norm.kind)
    if norm.weight == "none":
        return None
    match norm.over:
        case "projection":
            return (heads * head_dim,)
        case "head":
            pass
        case _:
            assert_never(norm.over)
    match norm.weight:
        case "per_head":
            return (heads, head_dim)
        case "shared":
            return (head_dim,)
        case _:
            assert_never(norm.weight)


def mlp_tensors(model: ModelConfig, ours: str, theirs: str) -> Iterator[TensorName]:
    """Yield the three matrices of a gated MLP."""
    for name in ("gate", "up", "down"):
        wide = (model.intermediate_size, model.hidden_size)
        yield TensorName(
            f"{ours}.mlp.{name}.weight",
            f"{theirs}.mlp.{name}_proj.weight",
            wide[::-1] if name == "down" else wide,
        )
