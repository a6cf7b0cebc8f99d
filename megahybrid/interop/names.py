"""Which Hugging Face tensor is which of ours, and in which order it keeps the rows of a head.

Inside our model a rotation turns pairs (i, i + rotary_dim / 2). Cohere's classes turn (2i, 2i + 1);
and a rotation of part of a head, said as `proportional`, turns pairs of the whole head. Queries and
keys of rotated layers are reordered for them; a layer without rotation keeps its order, because
there any order that queries and keys share gives the same scores.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megahybrid.config.attention import AttentionScheme, LayerPlan, Rope, SsmaxScale
from megahybrid.config.model import ModelConfig

NORMS = {
    "parallel": {"norm": "input_layernorm"},
    "pre_norm": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "post_norm": {
        "attention_norm": "post_attention_layernorm",
        "mlp_norm": "post_feedforward_layernorm",
    },
}
INTERLEAVED = ("Cohere", "Cohere2")
OWN = "Megahybrid"  # our own class, which keeps our order
SINKS = "GraniteSWA"
HEAD = "lm_head.weight"  # where it is not the embedding
NO_SINK = -1e9  # as an extra logit beside the scores it takes no weight


@dataclass(frozen=True)
class TensorName:
    """One tensor under both names; `order` is None, or for each of their rows of a head the one of
    ours. `ours` is None for a tensor that only they have, filled with `constant`."""

    ours: str | None
    theirs: str
    shape: tuple[int, ...]
    order: tuple[int, ...] | None = None
    constant: float = 0.0

    @property
    def in_last_dimension(self) -> bool:
        """Whether `order` is of the last dimension: a QK-norm's weight of one row per head."""
        return self.ours is not None and self.ours.endswith("_norm.weight") and len(self.shape) > 1


def row_order(
    head_dim: int, scheme: AttentionScheme, interleaved: bool, own: bool = False
) -> tuple[int, ...] | None:
    """For each row of a head as the class keeps it, our row; None where the orders agree."""
    if own or not isinstance(scheme.position, Rope):
        return None
    rotary_dim = scheme.position.rotary_dim(head_dim)
    pairs = rotary_dim // 2
    still = list(range(rotary_dim, head_dim))
    if interleaved:
        order = [row for pair in range(pairs) for row in (pair, pairs + pair)] + still
    else:
        fill = head_dim // 2 - pairs
        order = [*range(pairs), *still[:fill], *range(pairs, rotary_dim), *still[fill:]]
    return None if order == list(range(head_dim)) else tuple(order)


def tensor_names(model: ModelConfig, plan: LayerPlan, architecture: str) -> Iterator[TensorName]:
    """Every tensor of the model as `architecture` has it, in the order of the layers."""
    hidden, head_dim = model.hidden_size, model.head_dim
    yield TensorName("embedding.weight", "model.embed_tokens.weight", (model.vocab_size, hidden))
    for index, scheme in enumerate(plan.expand()):
        order = row_order(head_dim, scheme, architecture in INTERLEAVED, architecture == OWN)
        ours, theirs = f"blocks.{index}", f"model.layers.{index}"
        for name, norm in NORMS[model.block].items():
            yield TensorName(f"{ours}.{name}.weight", f"{theirs}.{norm}.weight", (hidden,))
        yield from _attention(model, scheme, ours, f"{theirs}.self_attn", order)
        if architecture == SINKS:
            yield TensorName(
                None, f"{theirs}.self_attn.sinks", (model.num_heads,), constant=NO_SINK
            )
        for name in ("gate", "up", "down"):
            wide = (model.intermediate_size, hidden)
            yield TensorName(
                f"{ours}.mlp.{name}.weight",
                f"{theirs}.mlp.{name}_proj.weight",
                wide[::-1] if name == "down" else wide,
            )
    yield TensorName("final_norm.weight", "model.norm.weight", (hidden,))
    if not model.tie_embeddings:
        yield TensorName("head.weight", HEAD, (model.vocab_size, hidden))


def _attention(
    model: ModelConfig,
    scheme: AttentionScheme,
    ours: str,
    theirs: str,
    order: tuple[int, ...] | None,
) -> Iterator[TensorName]:
    hidden, head_dim = model.hidden_size, model.head_dim
    heads = {"query": model.num_heads, "key": model.num_kv_heads, "value": model.num_kv_heads}
    for name, count in heads.items():
        yield TensorName(
            f"{ours}.attention.{name}.weight",
            f"{theirs}.{name[0]}_proj.weight",
            (count * head_dim, hidden),
            None if name == "value" else order,
        )
    yield TensorName(
        f"{ours}.attention.output.weight",
        f"{theirs}.o_proj.weight",
        (hidden, model.num_heads * head_dim),
    )
    if scheme.qk_norm.kind != "none":
        for name in ("query", "key"):
            shape: tuple[int, ...] = (head_dim,)
            if scheme.qk_norm.over == "projection":
                shape = (heads[name] * head_dim,)
            elif scheme.qk_norm.weight == "per_head":
                shape = (heads[name], head_dim)
            yield TensorName(
                f"{ours}.attention.{name}_norm.weight",
                f"{theirs}.{name[0]}_norm.weight",
                shape,
                order,
            )
    if isinstance(scheme.score_scale, SsmaxScale):
        shape = (model.num_heads,)
        yield TensorName(f"{ours}.attention.logit_scale", f"{theirs}.logit_scale", shape)
