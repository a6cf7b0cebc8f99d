"""Attention written out: the kernel that every other one is compared with."""

import torch
from jaxtyping import Float
from torch import Tensor

from megahybrid.model.kernels.documents import Documents


def attend_reference(
    q: Float[Tensor, "seq batch heads head_dim"],
    k: Float[Tensor, "seq batch kv_heads head_dim"],
    v: Float[Tensor, "seq batch kv_heads head_dim"],
    *,
    window: int | None,
    documents: Documents | None,
    scale: float,
) -> Float[Tensor, "seq batch heads head_dim"]:
    """softmax(scale * q kᵀ + mask) v with a dense mask, in fp32 (fp64 for fp64 inputs).

    Memory is heads × seq × seq: for tests and short sequences.
    """
    seq, batch = q.shape[:2]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    if documents is None:
        documents = Documents(torch.zeros(batch, seq, dtype=torch.int64, device=q.device))
    allowed = documents.visible(window)[:, None, None]

    grouped = q.to(compute).unflatten(
        2, (k.shape[2], -1)
    )  # [seq, batch, kv_heads, group, head_dim]
    scores = torch.einsum("ibhgd,jbhd->bhgij", grouped, k.to(compute)) * scale
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhgij,jbhd->ibhgd", weights, v.to(compute)).flatten(2, 3).to(q.dtype)
