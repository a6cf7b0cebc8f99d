"""Attention written out: the kernel that every other one is compared with."""

import torch
from jaxtyping import Float
from torch import Tensor

from megahybrid.model.kernels.documents import Documents
from megahybrid.model.kernels.kernel import Kernel
from megahybrid.model.kernels.sinks import softmax_with_sinks
from megahybrid.model.kernels.spec import AttentionSpec


def attend_reference(
    q: Float[Tensor, "seq batch heads head_dim"],
    k: Float[Tensor, "keys batch kv_heads head_dim"],
    v: Float[Tensor, "keys batch kv_heads head_dim"],
    spec: AttentionSpec,
) -> Float[Tensor, "seq batch heads head_dim"]:
    """softmax(scale * q kᵀ + mask) v with a dense mask, in fp32 (fp64 for fp64 inputs); a sink is
    one more column of the softmax, which no value belongs to.

    Memory is heads × keys × keys: for tests and short sequences.
    """
    keys, batch = k.shape[:2]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    documents = spec.documents
    if documents is None:
        documents = Documents(torch.zeros(batch, keys, dtype=torch.int64, device=q.device))
    allowed = documents.visible(spec.window)[:, None, None, spec.before or 0 :]

    grouped = q.to(compute).unflatten(
        2, (k.shape[2], -1)
    )  # [seq, batch, kv_heads, group, head_dim]
    scores = torch.einsum("ibhgd,jbhd->bhgij", grouped, k.to(compute)) * spec.scale
    scores = scores.masked_fill(~allowed, float("-inf"))
    if spec.sinks is None:
        weights = scores.softmax(dim=-1)
    else:
        weights = softmax_with_sinks(scores.flatten(1, 2), spec.sinks)[..., :-1]
        weights = weights.unflatten(1, (k.shape[2], -1))
    return torch.einsum("bhgij,jbhd->ibhgd", weights, v.to(compute)).flatten(2, 3).to(q.dtype)


KERNEL = Kernel(
    "reference",
    attend_reference,
    serves=frozenset({"window", "documents", "before", "sinks"}),
    quadratic=True,
)
