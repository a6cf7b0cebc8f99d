"""SDPA under a mask of the keys that each query sees: for keys in a cache, in any order."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from megahybrid.model.kernels.documents import additive
from megahybrid.model.kernels.kernel import Kernel
from megahybrid.model.kernels.sinks import written_out
from megahybrid.model.kernels.spec import AttentionSpec

SCORE_BYTES = 64 * 2**20  # of scores that are written out at a time


def attend_masked(
    q: Float[Tensor, "queries batch heads head_dim"],
    k: Float[Tensor, "keys batch kv_heads head_dim"],
    v: Float[Tensor, "keys batch kv_heads head_dim"],
    spec: AttentionSpec,
) -> Float[Tensor, "queries batch heads head_dim"]:
    """softmax(scale q kᵀ) v over the keys that `spec.visible` allows. Memory is queries × keys."""
    assert spec.visible is not None
    keys, values = (x.permute(1, 2, 0, 3) for x in (k, v))
    grouped = q.permute(1, 2, 0, 3).unflatten(1, (keys.shape[1], -1))
    mask = additive(spec.visible, q.dtype)[:, None]  # [batch, 1, queries, keys]
    if spec.sinks is not None:
        return _with_sinks(q.permute(1, 2, 0, 3), keys, values, mask, spec.scale, spec.sinks)
    if len(q) == 1:  # the queries that share a key are few: one product serves them
        out = F.scaled_dot_product_attention(
            grouped[:, :, :, 0], keys, values, attn_mask=mask, scale=spec.scale
        )[:, :, :, None]
    else:  # one call for each member of the groups, so that neither keys nor mask are repeated
        members = [
            F.scaled_dot_product_attention(member, keys, values, attn_mask=mask, scale=spec.scale)
            for member in grouped.unbind(2)
        ]
        out = torch.stack(members, dim=2)
    return out.flatten(1, 2).permute(2, 0, 1, 3)


def _with_sinks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, sinks: Tensor
) -> Tensor:
    """The scores of some queries at a time, written out: a cache's queries are few, and SDPA gives
    no sums for sinks to be put beside."""
    some = max(1, SCORE_BYTES // (8 * k.shape[2] * q.shape[1] * q.shape[0]))
    parts = [
        written_out(queries, k, v, rows, scale, sinks)
        for queries, rows in zip(q.split(some, dim=2), mask.split(some, dim=2), strict=True)
    ]
    return torch.cat(parts, dim=2).permute(2, 0, 1, 3)


KERNEL = Kernel(
    "masked",
    attend_masked,
    serves=frozenset({"visible", "sinks"}),
    needs=frozenset({"visible"}),
    rank=lambda spec: 0,
)
