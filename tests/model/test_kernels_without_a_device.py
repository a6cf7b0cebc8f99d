"""What a kernel asks of CUDA, on a machine that has none: tensors without storage go through the
very calls that a device would get, and shapes, dtypes, devices and arguments must fit."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megahybrid.config import chunk_sizes
from megahybrid.model import rotary
from megahybrid.model.context import SequenceContext
from megahybrid.model.kernels import (
    AttentionSpec,
    attend,
    blocked,
    documents,
    flash,
    flex,
    halves,
    sdpa,
    varlen,
)
from megahybrid.model.kernels.documents import Documents
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh
from tests.parity.cases import model

# A torch built without CUDA cannot slice a tensor that says it is there; on the host it can.
CUDA = torch.device("cuda" if torch.backends.cuda.is_built() else "cpu")
LENGTHS = [[30, 1, 97], [128]]
SEQ, ROWS, HEADS, KV_HEADS, HEAD_DIM = 128, 2, 4, 2, 64


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A device that answers and computes nothing. Gradients would ask its driver: none are kept."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    if CUDA.type == "cpu":
        for kernel in (varlen, flash):
            monkeypatch.setattr(kernel, "refusal", lambda *where: None)
    for module in (documents, varlen):  # no memory can be pinned without a driver
        monkeypatch.setattr(module, "to_device", lambda tensor, device: tensor.to(device))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield
    varlen.plain_boundaries.cache_clear()
    blocked._plain_mask.cache_clear()
    rotary.plain_table.cache_clear()
    rotary._frequencies.cache_clear()


def heads(count: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """As a fused product has them: a slice of wider rows."""
    wide = torch.empty(SEQ, ROWS, (count + 1) * HEAD_DIM, device=device, dtype=dtype)
    return wide[..., HEAD_DIM:].unflatten(-1, (count, HEAD_DIM))


def packed(device: torch.device) -> Documents:
    """Boundaries found on the host, as a batch brings them."""
    spans = [
        documents.Span(row, sum(lengths[:n]), sum(lengths[: n + 1]))
        for row, lengths in enumerate(LENGTHS)
        for n in range(len(lengths))
    ]
    starts = torch.zeros(ROWS, SEQ, dtype=torch.int64, device=device)
    return Documents(starts, {"spans": spans})


class Package:
    """flash_attn_varlen_func of FA3 and FA4 as their repositories have it."""

    def __init__(self, keywords: tuple[str, ...]) -> None:
        self.keywords, self.calls = keywords, []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        assert set(options) <= set(self.keywords), set(options) - set(self.keywords)
        assert q.dim() == k.dim() == v.dim() == 3 and q.stride(-1) == 1
        assert options["cu_seqlens_q"].dtype == torch.int32
        assert options["cu_seqlens_q"].device.type == CUDA.type
        self.calls.append(options)
        return torch.empty_like(q), None


KEYWORDS = (
    "cu_seqlens_q",
    "cu_seqlens_k",
    "max_seqlen_q",
    "max_seqlen_k",
    "softmax_scale",
    "causal",
    "window_size",
)


@pytest.mark.parametrize("rows", ["one-document", "documents"])
@pytest.mark.parametrize(
    "kernel,window",
    [
        ("varlen", None),
        ("varlen", 32),
        ("sdpa", None),
        ("blocked", 32),
        ("reference", 32),
        ("fa3", 32),
        ("fa3", None),
        ("fa4", 32),
        ("fa4", None),
    ],
)
def test_a_kernel_gives_heads_where_it_was_given_them(
    kernel: str, window: int | None, rows: str, hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "_shares_heads", lambda device, dtype: True)
    package = Package(KEYWORDS)
    monkeypatch.setattr(flash, "_function", lambda name: package)
    q, k, v = heads(HEADS, CUDA), heads(KV_HEADS, CUDA), heads(KV_HEADS, CUDA)
    documents = None if rows == "one-document" else packed(CUDA)
    out = attend(q, k, v, AttentionSpec(window=window, documents=documents, scale=0.125), kernel)
    assert out.shape == q.shape and out.dtype == q.dtype and out.device.type == CUDA.type
    for call in package.calls:
        none = None if kernel == "fa4" else -1
        assert call["window_size"] == ((none, none) if window is None else (31, 0))
        longest = SEQ
        assert call["max_seqlen_q"] == longest


BEFORE = 40


@pytest.mark.parametrize("rows", ["one-document", "documents"])
@pytest.mark.parametrize(
    "kernel,window,dtype",
    [
        ("varlen", None, torch.bfloat16),
        ("varlen", 32, torch.bfloat16),
        ("sdpa", None, torch.bfloat16),
        ("sdpa", None, torch.float32),
        ("sdpa", None, torch.float64),
        ("blocked", 32, torch.bfloat16),
        ("blocked", 32, torch.float32),
        ("reference", 32, torch.bfloat16),
        ("fa3", 32, torch.bfloat16),
        ("fa4", None, torch.bfloat16),
    ],
)
def test_fewer_queries_than_keys_keep_to_their_device(
    kernel: str,
    window: int | None,
    dtype: torch.dtype,
    rows: str,
    hopper: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(varlen, "_shares_heads", lambda device, dtype: True)
    monkeypatch.setattr(flash, "_function", lambda name: Package(KEYWORDS))
    q, k, v = (heads(n, CUDA, dtype) for n in (HEADS, KV_HEADS, KV_HEADS))
    documents = None if rows == "one-document" else packed(CUDA)
    spec = AttentionSpec(window=window, documents=documents, scale=0.125, before=BEFORE)
    out = attend(q[BEFORE:], k, v, spec, kernel)
    assert out.shape == q[BEFORE:].shape and out.dtype == dtype and out.device.type == CUDA.type


@pytest.mark.parametrize("rows", ["one-document", "documents"])
@pytest.mark.parametrize("before", [None, BEFORE])
@pytest.mark.parametrize("kernel,window", [("sdpa", None), ("varlen", None), ("varlen", 32)])
def test_halves_keep_to_their_device(
    kernel: str,
    window: int | None,
    before: int | None,
    rows: str,
    hopper: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(varlen, "_shares_heads", lambda device, dtype: True)
    q, k, v = (heads(n, CUDA) for n in (HEADS, KV_HEADS, KV_HEADS))
    q = q[before:]
    documents = None if rows == "one-document" else packed(CUDA)
    spec = AttentionSpec(window=window, documents=documents, scale=0.125, before=before)
    apart, asked = halves(q, k, spec, kernel) or pytest.fail("has none")
    out, kept = apart.forward(q, k, v, asked)
    grads = apart.backward(torch.empty_like(out), q, k, v, out, kept, asked)
    for found, like in zip((out, *grads), (q, q, k, v), strict=True):
        assert found.shape == like.shape and found.dtype == like.dtype
        assert found.device.type == CUDA.type
    if CUDA.type == "cuda" and kernel == "sdpa":
        q, k = (x.float() for x in (q, k))
        assert halves(q, k, spec, kernel) is None  # FlashAttention has no fp32


def test_sdpa_hands_cudnn_whole_rows_alone_and_heads_to_share_where_they_can_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allowed = []

    def called(q: Tensor, k: Tensor, *_: Tensor, **how: Any) -> Tensor:
        allowed.append((torch.backends.cuda.cudnn_sdp_enabled(), k.shape[1]))
        return q

    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", called)
    with FakeTensorMode():
        mask = torch.empty(1, 1, 64, 64, device="cuda")
        for dtype in (torch.bfloat16, torch.float32):
            q, k = (torch.empty(1, n, 64, 16, device="cuda", dtype=dtype) for n in (4, 2))
            sdpa.attend_heads(q, k, k, None, 0.25)
            sdpa.attend_heads(q, k, k, None, 0.25, part=True)
            sdpa.attend_heads(q, k, k, mask.to(dtype), 0.25)
    bf16, fp32 = [(True, 2), (False, 2), (False, 4)], [(True, 4), (False, 4), (False, 4)]
    assert allowed == bf16 + fp32


def test_heads_that_are_written_out_stay_beside_their_own_queries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(
        sdpa.F, "scaled_dot_product_attention", lambda *heads, **how: seen.extend(heads) or heads[0]
    )
    monkeypatch.setattr(Tensor, "is_cuda", True)
    q, k, v = (torch.randn(1, heads, 5, 8) for heads in (6, 2, 2))
    sdpa.attend_heads(q, k, v, None, 0.25)
    for whole, shared in zip(seen[1:], (k, v), strict=True):
        assert all(torch.equal(whole[:, head], shared[:, head // 3]) for head in range(6))


def test_pieces_of_rows_are_called_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[bool] = []

    def called(q: Tensor, *_: Any, part: bool = False) -> Tensor:
        parts.append(part)
        return q

    monkeypatch.setattr(sdpa, "attend_heads", called)
    length = sdpa.SHARED_TOKENS + 60
    q = torch.zeros(length, 1, 2, 16)
    several = Documents.from_lengths([[length - 50, 30, 20]])
    for where in (None, several):
        sdpa.attend_sdpa(q, q, q, AttentionSpec(documents=where, scale=0.25))
    assert parts == [False, True, True]


@contextmanager
def host_tensors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors without storage that say they are on the host, where autograd asks no driver."""
    monkeypatch.setattr(varlen, "refusal", lambda device, dtype, head_dim: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
    varlen.plain_boundaries.cache_clear()


@pytest.mark.parametrize("shares", [True, False], ids=["grouped", "written-out"])
@pytest.mark.parametrize("rows", ["one-document", "documents"])
@pytest.mark.parametrize("window", [None, 32])
def test_varlen_gives_every_gradient_its_shape(
    window: int | None, rows: str, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "_shares_heads", lambda device, dtype: shares)
    host = torch.device("cpu")
    with host_tensors(monkeypatch):
        q, k, v = (heads(n, host).requires_grad_() for n in (HEADS, KV_HEADS, KV_HEADS))
        where = None if rows == "one-document" else packed(host)
        spec = AttentionSpec(window=window, documents=where, scale=0.125)
        out = attend(q, k, v, spec, "varlen")
        grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        for grad, of in zip(grads, (q, k, v), strict=True):
            assert grad.shape == of.shape and grad.dtype == of.dtype


@pytest.mark.parametrize("block", ["pre_norm", "post_norm", "parallel"])
@pytest.mark.parametrize("policy", ["none", "chunked"])
def test_a_model_keeps_to_its_device(
    block: str, policy: str, hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "_shares_heads", lambda device, dtype: True)
    monkeypatch.setattr(chunk_sizes, "CHUNK_TOKENS", 48)
    config = model("rnope_swa", block)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # parameters without storage cannot be converted
    try:
        built = Transformer(
            config, ParallelMesh.single(CUDA), kernels=["varlen"] * 2, recompute=[policy] * 2
        )
    finally:
        torch.set_default_dtype(before)
    tokens = torch.zeros(ROWS, SEQ, dtype=torch.int64, device=CUDA)
    for where in (None, packed(CUDA)):
        context = SequenceContext(SEQ, where, CUDA, torch.bfloat16)
        hidden = built.embedding(tokens)
        for layer in built.blocks:
            hidden = layer(hidden, context)
        loss, per_token = built.head(built.final_norm(hidden), tokens, 1.0)
        assert hidden.dtype == torch.bfloat16 and loss.dtype == torch.float32
        assert hidden.device.type == loss.device.type == per_token.device.type == CUDA.type
        assert per_token.shape == tokens.shape


@pytest.mark.parametrize("kernel", ["flex", "sdpa"])
def test_what_indices_of_32_bits_cannot_reach_is_copied(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Tensor] = []

    def program(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> Tensor:
        given.extend((q, k, v))
        return q

    monkeypatch.setattr(flex, "_compiled", lambda: program)
    monkeypatch.setattr(flex, "_plain_mask", lambda *what: None)

    def heads(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> Tensor:
        program(*(x.transpose(1, 2) for x in (q, k, v)), mask, scale)
        return q

    monkeypatch.setattr(sdpa, "attend_heads", heads)
    # v as the 1B shape's parallel block has it: a slice of rows of 19,456.
    seq, options = 2**31 // 19_456 + 2, {"device": "meta", "dtype": torch.bfloat16}
    q, k = torch.empty(seq, 1, 4, 16, **options), torch.empty(seq, 1, 2, 16, **options)
    wide = torch.empty(seq, 1, 19_456, **options)
    for length, copied in ((seq, True), (seq - 1, False)):
        given.clear()
        v = wide[:length, :, 64:96].unflatten(-1, (2, 16))
        with torch.no_grad():
            attend(q[:length], k[:length], v, AttentionSpec(scale=0.25), kernel)
        assert given[2].is_contiguous() == copied and given[2].shape == (1, length, 2, 16)
