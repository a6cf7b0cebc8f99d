"""From normalised queries and keys to mixed values: position, query scale, `attend`.

Layers and the positional self-test both come through here: the test judges the code that runs.
"""

from jaxtyping import Float
from torch import Tensor

from megahybrid.config.attention import AttentionScheme, FixedScale, Nope, Rope
from megahybrid.model.context import SequenceContext
from megahybrid.model.kernels import attend
from megahybrid.model.rotary import rotate_both
from megahybrid.model.score_scale import QueryScale

Heads = Float[Tensor, "seq batch heads head_dim"]
KVHeads = Float[Tensor, "seq batch kv_heads head_dim"]


def mix(
    q: Heads,
    k: KVHeads,
    v: KVHeads,
    *,
    scheme: AttentionScheme,
    kernel: str,
    context: SequenceContext,
    query_scale: QueryScale | None,
) -> Heads:
    """One layer's attention as its scheme says it; q and k come normalised but not rotated."""
    q, k = positioned(q, k, scheme.position, context)
    if query_scale is not None:
        q = query_scale(q, context.documents, context.length)
    return attended(q, k, v, scheme=scheme, kernel=kernel, context=context)


def attended(
    q: Heads,
    k: KVHeads,
    v: KVHeads,
    *,
    scheme: AttentionScheme,
    kernel: str,
    context: SequenceContext,
) -> Heads:
    """`attend` as the scheme says it, of heads that are placed already."""
    return attend(
        q,
        k,
        v,
        window=scheme.window,
        documents=context.documents,
        scale=score_scale(scheme, q.shape[-1]),
        kernel=kernel,
    )


def positioned(
    q: Heads, k: KVHeads, position: Rope | Nope, context: SequenceContext
) -> tuple[Heads, KVHeads]:
    """q and k turned to their positions; the very same tensors where the scheme has no position."""
    if not isinstance(position, Rope):
        return q, k
    return rotate_both(q, k, context.rotary_table(position, q.shape[-1]))


def score_scale(scheme: AttentionScheme, head_dim: int) -> float:
    """What q·k is multiplied by for every query alike."""
    if isinstance(scheme.score_scale, FixedScale):
        return scheme.score_scale.scale
    return head_dim**-0.5
