"""A glance at the attention of a model that is training: a few queries of one row.

The same figures as `analyse`, by the same code, for the last tokens of a training row instead of
a question and its answer.
"""

import math
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from megahybrid.evaluate.attention import Tally, to_json
from megahybrid.evaluate.cache import by_layers
from megahybrid.evaluate.example import Example
from megahybrid.model.transformer import Transformer

QUERIES = 32  # the last tokens of the row
MOST_TOKENS = 4096  # of the row: a sample must stay cheap where rows are long
KEPT = ("mass", "entropy_bits", "max_logit", "distance", "sink")


@torch.no_grad()
def attention_sample(
    model: Transformer,
    tokens: Int[Tensor, "seq"],
    starts: Int[Tensor, "seq"] | None,
    kinds: list[str],
) -> dict[str, Any]:
    """Figures by layer and by kind of layer, as JSON values; every rank of a tensor axis calls it.

    *end* is the last QUERIES tokens, which are the queries; a key is also *begin* or *context*.
    """
    tokens = tokens[:MOST_TOKENS]
    starts = torch.zeros_like(tokens) if starts is None else starts[: len(tokens)]
    queries = min(QUERIES, len(tokens) // 2)
    example = Example(tuple(tokens.tolist()), len(tokens) - queries, len(tokens) - 1)
    device = model.embedding.weight.device
    tokens, starts = tokens[None].to(device), starts[None].to(device)
    tally = Tally(model, example, starts, position_bins=1)
    by_layers(model, tokens, starts, observe=tally)
    figures = to_json(tally.result(), kinds, math.inf)
    return {
        "tokens": tokens.shape[1],
        "queries": queries,
        "lag_edges": figures["lag_edges"],
        "by_kind": {
            kind: {name: part[name] for name in (*KEPT, "logit_by_lag")}
            for kind, part in figures["by_kind"].items()
        },
        "layers": [{name: part[name] for name in ("kind", *KEPT)} for part in figures["layers"]],
    }
