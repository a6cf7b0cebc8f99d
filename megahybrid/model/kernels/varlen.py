"""torch's bundled FlashAttention over packed documents: window, documents and GQA in one kernel."""

import inspect
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from megahybrid.model.kernels.cuda_limits import fused_refusal
from megahybrid.model.kernels.documents import Documents, Span, to_device
from megahybrid.model.kernels.kernel import Halves, Kernel, Measured
from megahybrid.model.kernels.spec import AttentionSpec, Place

LARGEST_HEAD_DIM = 256


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why this kernel cannot run there, or None if it can."""
    why_not = fused_refusal(device, dtype, head_dim, LARGEST_HEAD_DIM)
    if why_not:
        return why_not
    if "window_size" not in _parameters():
        return f"needs window_size in torch's varlen_attn (torch={torch.__version__})"
    return None


def attend_varlen(
    q: Float[Tensor, "seq batch heads head_dim"],
    k: Float[Tensor, "keys batch kv_heads head_dim"],
    v: Float[Tensor, "keys batch kv_heads head_dim"],
    spec: AttentionSpec,
) -> Float[Tensor, "seq batch heads head_dim"]:
    """Attention over the documents of all rows as one packed batch."""
    seq, batch, heads = q.shape[:3]
    packing = pack(q, k, spec)
    packed_q, packed_k, packed_v = packing.queries_of(q), packing.keys_of(k), packing.keys_of(v)
    if k.shape[2] != heads and not _shares_heads(q.device, q.dtype):
        packed_k, packed_v = (
            x.repeat_interleave(heads // k.shape[2], dim=1) for x in (packed_k, packed_v)
        )
    out = _call(packed_q, packed_k, packed_v, packing, _left(spec), spec.scale)
    return out.unflatten(0, (batch, seq)).transpose(0, 1)


KERNEL = Kernel(
    "varlen",
    attend_varlen,
    serves=frozenset({"window", "documents", "before"}),
    unavailable=lambda spec, place: refusal(*place[:3]),
    rank=lambda spec: 1,
    measured=Measured.FUSED,
    halves=lambda spec, place: halves(place),
    sums=lambda spec, place: sums(place),
)


def without_varlen(spec: AttentionSpec, place: Place) -> str | None:
    """Return why a kernel that hands rows of several documents to this one cannot, or None."""
    why_not = None if spec.documents is None else KERNEL.refusal(spec, place)
    return why_not and f"hands documents to varlen, which {why_not}"


class Packing(NamedTuple):
    """The borders of the documents of packed rows, among queries and among keys, int32
    [documents + 1] each. FlashAttention lays a document's last query against its last key, so
    fewer queries than keys are its last; a document without any would be none to it."""

    queries: Tensor
    keys: Tensor
    longest_queries: int
    longest_keys: int
    first_keys: tuple[int, ...]  # of each row, the first that a query sees or its document has

    def queries_of(self, x: Tensor) -> Tensor:
        """Return x [seq, batch, heads, head_dim] with its rows one behind the other."""
        return x.transpose(0, 1).flatten(0, 1)

    def keys_of(self, x: Tensor) -> Tensor:
        """Return the keys or values that are packed, [keys of all rows, kv_heads, head_dim]."""
        if not any(self.first_keys):
            return self.queries_of(x)
        rows = zip(x.unbind(1), self.first_keys, strict=True)
        return torch.cat([row[first:] for row, first in rows])

    def unpack_keys(self, packed: Tensor, keys: int) -> Tensor:
        """Return the inverse of `keys_of`, for rows of `keys` tokens; zeros where none was
        packed."""
        if not any(self.first_keys):
            return packed.unflatten(0, (-1, keys)).transpose(0, 1)
        rows = packed.split([keys - first for first in self.first_keys])
        padded = [
            F.pad(row, (0, 0, 0, 0, first, 0))
            for row, first in zip(rows, self.first_keys, strict=True)
        ]
        return torch.stack(padded, dim=1)


def pack(q: Tensor, k: Tensor, spec: AttentionSpec) -> Packing:
    """Return how queries and keys of this spec are packed: keys that no query of their row can see
    are left out where some come before the first query."""
    (seq, batch), documents, before = q.shape[:2], spec.documents, spec.before or 0
    first = 0 if spec.window is None else max(before + 1 - spec.window, 0)
    if documents is None:
        keys = len(k) - first
        of_queries, of_keys = (plain_boundaries(batch, n, q.device) for n in (seq, keys))
        return Packing(of_queries, of_keys, seq, keys, (first,) * batch)
    if before:
        return documents.keep(
            ("varlen", spec.window, before), lambda: _pack_last(documents, before, first)
        )
    packed, longest = documents.keep("varlen", lambda: packed_boundaries(documents))
    return Packing(packed, packed, longest, longest, (0,) * batch)


def _pack_last(documents: Documents, before: int, first: int) -> Packing:
    """Pack the documents that end after token `before`: their queries from there on, and their keys
    from `first` on."""
    spans = [span for span in documents.spans() if span.stop > before]
    queries = [span.stop - max(span.start, before) for span in spans]
    keys = [span.stop - max(span.start, first) for span in spans]
    firsts: dict[int, int] = {}
    for span in spans:
        firsts.setdefault(span.row, max(span.start, first))
    of_queries, of_keys = (
        to_device(torch.tensor([0, *accumulate(n)], dtype=torch.int32), documents.device)
        for n in (queries, keys)
    )
    return Packing(of_queries, of_keys, max(queries), max(keys), tuple(firsts.values()))


def _left(spec: AttentionSpec) -> int:
    """Return how many keys before its own a query sees, as FlashAttention counts; -1: all."""
    return -1 if spec.window is None else spec.window - 1


@lru_cache(maxsize=16)
def plain_boundaries(batch: int, seq: int, device: torch.device) -> Tensor:
    """Return the boundaries of rows of one document, int32 [batch + 1]: alike for every batch."""
    return torch.arange(0, batch * seq + 1, seq, dtype=torch.int32, device=device)


def packed_boundaries(documents: Documents) -> tuple[Tensor, int]:
    """Cumulative document lengths, int32 [documents + 1], rows one behind the other; and the
    longest document."""
    spans: list[Span] = documents.spans()
    ends = [span.row * documents.seq + span.stop for span in spans]
    boundaries = torch.tensor([0, *ends], dtype=torch.int32)
    return to_device(boundaries, documents.device), max(span.stop - span.start for span in spans)


def _call(q: Tensor, k: Tensor, v: Tensor, packing: Packing, left: int, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scale, "window_size": (left, 0)}
    if "enable_gqa" in _parameters():
        options["enable_gqa"] = k.shape[1] != q.shape[1]
    found: Any = varlen_attn(q, k, v, *packing[:4], **options)
    return found


def halves(place: Place) -> Halves | None:
    """Return its forward and backward apart, by torch's operators beneath varlen_attn."""
    if refusal(*place[:3]) is not None or not _shares_heads(place.device, place.dtype):
        return None
    return Halves(_forward, _backward)


def sums(place: Place) -> Halves | None:
    """Return halves whose sums are [batch, heads, seq]; packed they are [heads, tokens]."""
    if halves(place) is None:
        return None

    def forward(
        q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        out, (packed,) = _forward(q, k, v, spec)
        return out, (packed.unflatten(-1, (q.shape[1], -1)).transpose(0, 1),)

    def backward(
        grad_output: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        kept: tuple[Tensor, ...],
        spec: AttentionSpec,
    ) -> tuple[Tensor, Tensor, Tensor]:
        packed = kept[0].transpose(0, 1).flatten(1)
        return _backward(grad_output, q, k, v, out, (packed,), spec)

    return Halves(forward, backward)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec
) -> tuple[Tensor, tuple[Tensor, ...]]:
    packing = pack(q, k, spec)
    out, sums, *_ = torch.ops.aten._flash_attention_forward(
        packing.queries_of(q.detach()),
        packing.keys_of(k.detach()),
        packing.keys_of(v.detach()),
        *packing[:4],
        0.0,
        spec.window is None,  # causal
        return_debug_mask=False,
        scale=spec.scale,
        window_size_left=_left(spec),
        window_size_right=0,
    )
    return out.unflatten(0, (q.shape[1], -1)).transpose(0, 1), (sums,)


def _backward(
    grad_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    kept: tuple[Tensor, ...],
    spec: AttentionSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    packing = pack(q, k, spec)
    by_q, by_k, by_v = torch.ops.aten._flash_attention_backward(
        packing.queries_of(grad_output.detach()),
        packing.queries_of(q.detach()),
        packing.keys_of(k.detach()),
        packing.keys_of(v.detach()),
        packing.queries_of(out.detach()),
        *kept,
        *packing[:4],
        0.0,
        spec.window is None,
        # Of a dropout that is not there, as varlen_attn has them.
        torch.zeros(2, dtype=torch.uint64, device=q.device),
        torch.empty(0, device=q.device),
        scale=spec.scale,
        window_size_left=_left(spec),
        window_size_right=0,
    )
    return (
        by_q.unflatten(0, (q.shape[1], -1)).transpose(0, 1),
        packing.unpack_keys(by_k, len(k)),
        packing.unpack_keys(by_v, len(k)),
    )


@cache
def _shares_heads(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether KV heads may be fewer than queries': torch 2.11 has no argument for that but
    looks at nothing either, and its kernel does. Tried once, forward and backward, on 16 tokens:
    heads written out would be read and kept once per query head."""
    if "enable_gqa" in _parameters():
        return True
    generator = torch.Generator(device).manual_seed(0)

    def drawn(heads: int) -> Tensor:
        made = torch.randn(16, heads, 64, device=device, dtype=dtype, generator=generator)
        return made.requires_grad_()

    q, k, v, grad_output = drawn(2), drawn(1), drawn(1), drawn(2).detach()
    boundaries = plain_boundaries(1, 16, device)
    packing = Packing(boundaries, boundaries, 16, 16, (0,))
    found = []
    # Hooks of its own: a layer under recomputation counts what is saved inside of it.
    own_hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    try:
        with torch.enable_grad(), own_hooks:
            for copies in (1, 2):
                keys, values = (x.repeat_interleave(copies, dim=1) for x in (k, v))
                out = _call(q, keys, values, packing, 7, 0.125)
                found.append((out, *torch.autograd.grad(out, (q, k, v), grad_output)))
    except (RuntimeError, ValueError):
        return False
    return all(
        bool((a.float() - b.float()).norm() < 0.02 * b.float().norm())
        for a, b in zip(*found, strict=True)
    )


@cache
def _parameters() -> frozenset[str]:
    """Return what this torch's varlen_attn accepts: 2.10 knew neither windows nor grouped heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)
