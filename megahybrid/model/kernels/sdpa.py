"""Full causal attention from SDPA; documents are cut apart, so no mask grows with the square."""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megahybrid.model.kernels import varlen
from megahybrid.model.kernels.cuda_limits import within_int32_offsets
from megahybrid.model.kernels.documents import Documents, Span, additive, visible
from megahybrid.model.kernels.kernel import Halves, Kernel, Measured
from megahybrid.model.kernels.last_queries import attend_last, backward_on_cpu, forward_on_cpu
from megahybrid.model.kernels.spec import AttentionSpec, Place

# Documents shorter than this share one masked call; a longer one has a call of its own, unmasked.
SHARED_TOKENS = 512
# Rows, their queries and keys, and an additive mask: where one call of a kernel is made.
Call = tuple[slice, slice, slice, Tensor | None]
BUT_CUDNN = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def attend_sdpa(
    q: Float[Tensor, "seq batch heads head_dim"],
    k: Float[Tensor, "keys batch kv_heads head_dim"],
    v: Float[Tensor, "keys batch kv_heads head_dim"],
    spec: AttentionSpec,
) -> Float[Tensor, "seq batch heads head_dim"]:
    """Attention to all earlier keys of the document; memory is linear in seq.

    No key outside a document is ever computed: a document, or a run of short ones, is attention on
    its own slice. With keys before the first query, the document of that query has fewer queries
    than keys, and those that end earlier are not read.
    """
    documents, scale, before = spec.documents, spec.scale, spec.before or 0
    # [batch, heads, seq, head_dim]
    q, k, v = (within_int32_offsets(x.transpose(0, 1)).transpose(1, 2) for x in (q, k, v))
    if documents is None:
        out = attend_last(q, k, v, scale) if before else attend_heads(q, k, v, None, scale)
    elif documents.seq <= SHARED_TOKENS and not before:
        mask = documents.keep(("sdpa", q.dtype), lambda: additive(documents.visible(None), q.dtype))
        out = attend_heads(q, k, v, mask[:, None], scale)
    else:
        out = _attend_runs(q, k, v, documents, scale, before)
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


def _attend_runs(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, before: int
) -> Tensor:
    rows = []
    # unbind and split: their backward is one concatenation, where that of slices would be a sum of
    # as many full-length tensors as there are runs.
    for runs, row_q, row_k, row_v in zip(
        masked_runs(documents, q.dtype, before), q.unbind(), k.unbind(), v.unbind(), strict=True
    ):
        unseen = runs[0][0].start  # keys of documents that end before the first query
        lengths = [run.stop - run.start for run, _ in runs]
        parts_k, parts_v = (x.split([unseen, *lengths], dim=1)[1:] for x in (row_k, row_v))
        parts_q = row_q.split([run.stop - max(run.start, before) for run, _ in runs], dim=1)
        outs = [
            _attend_run(part_q[None], part_k[None], part_v[None], mask, scale)[0]
            for part_q, part_k, part_v, (_, mask) in zip(
                parts_q, parts_k, parts_v, runs, strict=True
            )
        ]
        rows.append(torch.cat(outs, dim=1))
    return torch.stack(rows)


def _attend_run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    if mask is None and q.shape[2] < k.shape[2]:
        return attend_last(q, k, v, scale)
    return attend_heads(q, k, v, mask, scale, part=True)


def masked_runs(
    documents: Documents, dtype: torch.dtype, before: int
) -> list[list[tuple[Span, Tensor | None]]]:
    """Return the runs of each row that the queries from token `before` on are in: the keys of each,
    and where it holds several documents an additive mask [1, queries, keys]. Kept."""

    return documents.keep(("sdpa runs", dtype, before), lambda: _masks(documents, dtype, before))


def _masks(
    documents: Documents, dtype: torch.dtype, before: int
) -> list[list[tuple[Span, Tensor | None]]]:
    spans = set(documents.spans())
    rows: list[list[tuple[Span, Tensor | None]]] = [[] for _ in range(documents.starts.shape[0])]
    for run in runs(documents, before):
        mask = None
        if run not in spans:
            starts = documents.starts[run.row : run.row + 1]
            first = max(run.start, before)
            mask = additive(visible(starts, first, run.stop, run.start, run.stop, None), dtype)
        rows[run.row].append((run, mask))
    return rows


def runs(documents: Documents, before: int = 0) -> list[Span]:
    """Return the documents that end behind token `before`, with neighbours joined while the joined
    run has at most SHARED_TOKENS."""
    joined: list[Span] = []
    for span in documents.spans():
        if span.stop <= before:
            continue
        last = joined[-1] if joined else None
        if last and last.row == span.row and span.stop - last.start <= SHARED_TOKENS:
            joined[-1] = Span(span.row, last.start, span.stop)
        else:
            joined.append(span)
    return joined


def halves(place: Place) -> Halves | None:
    """Return its forward and backward apart: on a CPU the calls of torch's flash kernel that SDPA
    makes there; on CUDA FlashAttention's own, where it serves."""
    if place.device.type == "cpu":
        return Halves(_forward_on_cpu, _backward_on_cpu)
    return varlen.halves(place)


def sums(place: Place) -> Halves | None:
    """Return halves that keep each query's sum alone."""
    return halves(place) if place.device.type == "cpu" else varlen.sums(place)


def _forward_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec
) -> tuple[Tensor, tuple[Tensor, ...]]:
    q, k, v = (x.detach().permute(1, 2, 0, 3) for x in (q, k, v))
    if spec.documents is None:
        out, sums = forward_on_cpu(q, k, v, None, spec.scale)
        return out.permute(2, 0, 1, 3), (sums,)
    out = torch.empty_like(q.permute(2, 0, 1, 3), memory_format=torch.contiguous_format)
    by_head = out.permute(1, 2, 0, 3)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    sums = torch.empty(q.shape[:-1], dtype=wide)
    for rows, queries, keys, mask in _calls(spec, q.dtype):
        by_head[rows, :, queries], sums[rows, :, queries] = forward_on_cpu(
            q[rows, :, queries], k[rows, :, keys], v[rows, :, keys], mask, spec.scale
        )
    return out, (sums,)


def _backward_on_cpu(
    grad_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    kept: tuple[Tensor, ...],
    spec: AttentionSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    given = grad_output, q, k, v, out
    grad_output, q, k, v, out = (x.detach().permute(1, 2, 0, 3) for x in given)
    (sums,) = kept
    if spec.documents is None:
        found = backward_on_cpu(grad_output, q, k, v, out, sums, None, spec.scale)
        by_q, by_k, by_v = (x.permute(2, 0, 1, 3) for x in found)
        return by_q, by_k, by_v
    # Zeros, as keys that no query sees are in no call.
    by_q, by_k, by_v = (torch.zeros_like(x) for x in (q, k, v))
    for rows, queries, keys, mask in _calls(spec, q.dtype):
        of_q, of_k = (rows, slice(None), queries), (rows, slice(None), keys)
        by_q[of_q], by_k[of_k], by_v[of_k] = backward_on_cpu(
            grad_output[of_q], q[of_q], k[of_k], v[of_k], out[of_q], sums[of_q], mask, spec.scale
        )
    by_q, by_k, by_v = (x.permute(2, 0, 1, 3) for x in (by_q, by_k, by_v))
    return by_q, by_k, by_v


def _calls(spec: AttentionSpec, dtype: torch.dtype) -> Iterator[Call]:
    assert spec.documents is not None
    before = spec.before or 0
    for row, runs in enumerate(masked_runs(spec.documents, dtype, before)):
        for run, mask in runs:
            queries = slice(max(run.start - before, 0), run.stop - before)
            four = None if mask is None else mask[:, None]  # rows and heads: SDPA's, for all heads
            yield slice(row, row + 1), queries, slice(run.start, run.stop), four


KERNEL = Kernel(
    "sdpa",
    attend_sdpa,
    serves=frozenset({"documents", "before"}),
    # Rows of several documents are a call for each: a fused kernel has one for all.
    rank=lambda spec: 0 if spec.documents is None else 2,
    measured=Measured.ALWAYS,
    halves=lambda spec, place: halves(place),
    sums=lambda spec, place: sums(place),
)
