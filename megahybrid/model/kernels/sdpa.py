"""Full causal attention from SDPA; documents are cut apart, so no mask grows with the square."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megahybrid.model.kernels.cuda_limits import within_int32_offsets
from megahybrid.model.kernels.documents import Documents, Span, additive, visible
from megahybrid.model.kernels.kernel import Kernel, Measured
from megahybrid.model.kernels.spec import AttentionSpec

# Documents shorter than this share one masked call; a longer one has a call of its own, unmasked.
SHARED_TOKENS = 512
BUT_CUDNN = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def attend_sdpa(
    q: Float[Tensor, "seq batch heads head_dim"],
    k: Float[Tensor, "seq batch kv_heads head_dim"],
    v: Float[Tensor, "seq batch kv_heads head_dim"],
    spec: AttentionSpec,
) -> Float[Tensor, "seq batch heads head_dim"]:
    """Attention to all earlier keys of the document; memory is linear in seq.

    No key outside a document is ever computed: a document, or a run of short ones, is attention on
    its own slice.
    """
    documents, scale = spec.documents, spec.scale
    # [batch, heads, seq, head_dim]
    q, k, v = (within_int32_offsets(x.transpose(0, 1)).transpose(1, 2) for x in (q, k, v))
    if documents is None:
        out = attend_heads(q, k, v, None, scale)
    elif documents.seq <= SHARED_TOKENS:
        mask = documents.keep(("sdpa", q.dtype), lambda: additive(documents.visible(None), q.dtype))
        out = attend_heads(q, k, v, mask[:, None], scale)
    else:
        out = _attend_runs(q, k, v, documents, scale)
    return out.permute(2, 0, 1, 3)


def attend_heads(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, *, part: bool = False
) -> Tensor:
    """SDPA of [batch, heads, seq, head_dim]: causal, or under an additive mask. `part` says that
    these are a piece of a row, as long as the documents make it."""
    # Not by cuDNN, though torch takes it first on Hopper: its backward with a mask gives NaN at
    # some lengths (github.com/pytorch/pytorch/issues/196678, torch 2.11 to 2.13), and it compiles
    # a graph for each length that it has not met.
    elsewhere = q.is_cuda and (mask is not None or part)
    if q.is_cuda and (mask is not None or q.dtype == torch.float32):
        # Grouped heads under a mask or in fp32 would get the kernel that holds all scores.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    with sdpa_kernel(list(BUT_CUDNN)) if elsewhere else nullcontext():
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )


def _attend_runs(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> Tensor:
    masks = documents.keep(("sdpa runs", q.dtype), lambda: _masks(documents, q.dtype))
    rows = []
    # unbind and split: their backward is one concatenation, where that of slices would be a sum of
    # as many full-length tensors as there are runs.
    for runs, row_q, row_k, row_v in zip(masks, q.unbind(), k.unbind(), v.unbind(), strict=True):
        lengths = [run.stop - run.start for run, _ in runs]
        parts = zip(*(x.split(lengths, dim=1) for x in (row_q, row_k, row_v)), strict=True)
        outs = [
            attend_heads(part_q[None], part_k[None], part_v[None], mask, scale, part=True)[0]
            for (part_q, part_k, part_v), (_, mask) in zip(parts, runs, strict=True)
        ]
        rows.append(torch.cat(outs, dim=1))
    return torch.stack(rows)


def _masks(documents: Documents, dtype: torch.dtype) -> list[list[tuple[Span, Tensor | None]]]:
    """The runs of each row, with a mask where a run holds several documents."""
    spans = set(documents.spans())
    rows: list[list[tuple[Span, Tensor | None]]] = [[] for _ in range(documents.starts.shape[0])]
    for run in runs(documents):
        mask = None
        if run not in spans:
            starts = documents.starts[run.row : run.row + 1]
            mask = additive(visible(starts, run.start, run.stop, run.start, run.stop, None), dtype)
        rows[run.row].append((run, mask))
    return rows


def runs(documents: Documents) -> list[Span]:
    """The documents with neighbours joined while the joined run has at most SHARED_TOKENS."""
    joined: list[Span] = []
    for span in documents.spans():
        last = joined[-1] if joined else None
        if last and last.row == span.row and span.stop - last.start <= SHARED_TOKENS:
            joined[-1] = Span(span.row, last.start, span.stop)
        else:
            joined.append(span)
    return joined


KERNEL = Kernel(
    "sdpa",
    attend_sdpa,
    serves=frozenset({"documents"}),
    # Rows of several documents are a call for each: a fused kernel has one for all.
    rank=lambda spec: 0 if spec.documents is None else 2,
    measured=Measured.ALWAYS,
)
