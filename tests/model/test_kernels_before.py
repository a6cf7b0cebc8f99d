"""Attention of the last tokens of a row to all of its keys: every kernel that serves it gives the
rows that it would give for the whole, and makes no mask of queries × keys."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megahybrid.config.training import KernelConfig
from megahybrid.errors import ConfigError
from megahybrid.model.kernels import (
    AttentionSpec,
    Place,
    attend,
    choice,
    choose,
    cudnn,
    flash,
    flex,
    halves,
    last_queries,
    sdpa,
    tiles,
    varlen,
)
from megahybrid.model.kernels.chosen import ChosenKernels
from megahybrid.model.kernels.documents import Documents
from megahybrid.model.kernels.registry import REGISTRY, measured
from tests.model.kernels_before import (
    BEFORE,
    HEADS,
    KEYS,
    QUERIES,
    ROWS,
    WINDOWS,
    assert_same,
    documents_of,
    drawn,
    last,
    results,
    whole,
)
from tests.parallel.compare import EXACT, error

CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"heads{heads[0]}-kv{heads[1]}")
def test_the_last_rows_of_the_whole(heads: tuple[int, int], rows: str) -> None:
    inputs, documents = drawn(heads), documents_of(rows)
    right = results(inputs, whole(documents=documents))
    for kernel in ("sdpa", "blocked", "reference", "auto"):
        assert_same(results(inputs, last(kernel, documents=documents)), right)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("window", WINDOWS)
def test_the_last_rows_of_the_whole_in_a_window(window: int, rows: str) -> None:
    inputs, documents = drawn(), documents_of(rows)
    right = results(inputs, whole(documents=documents, window=window))

    def by_tiles(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tiles.attend_tiles(q, k, v, window=window, documents=documents, scale=0.3)

    for call in (last("blocked", documents=documents, window=window), by_tiles):
        assert_same(results(inputs, call), right)
    assert_same(results(inputs, last("reference", documents=documents, window=window)), right)


@pytest.mark.parametrize("before", [0, 1, 63, 64, 65, 99])
def test_a_halo_of_any_length_up_to_the_window(before: int) -> None:
    """A row's first tokens have fewer keys before them than the window has."""
    queries = 6 * tiles.TILE + 1  # a last tile of one query
    inputs = drawn(keys=before + queries, rows=1)
    for window in (100, 257):
        right = results(inputs, whole(window=window), queries)

        def by_tiles(q: Tensor, k: Tensor, v: Tensor, window: int = window) -> Tensor:
            return tiles.attend_tiles(q, k, v, window=window, documents=None, scale=0.3)

        for call in (last("blocked", window=window), by_tiles):
            assert_same(results(inputs, call, queries), right)


def test_a_single_query_and_long_documents() -> None:
    inputs = drawn((2, 1), keys=1200, rows=1)
    for lengths in ([[600, 600]], [[520, 530, 150]], [[1199, 1]]):
        documents = Documents.from_lengths(lengths)
        for queries in (1, 300):
            right = results(inputs, whole(documents=documents), queries)
            assert_same(results(inputs, last("sdpa", documents=documents), queries), right)


def test_heads_that_do_not_lie_side_by_side_are_read_right() -> None:
    q, k, v, grad = drawn()
    strewn = [x.mT.contiguous().mT for x in (q, k, v)]
    right = results([q, k, v, grad], whole())
    found = attend(strewn[0][-QUERIES:], *strewn[1:], AttentionSpec(scale=0.3, before=BEFORE))
    assert error(found, right[0]) < EXACT
    for call in (last("sdpa"), whole()):  # the gradient of a sum is one number, seen many times
        leaves = [x.clone().requires_grad_() for x in (q[-QUERIES:], k, v)]
        grads = torch.autograd.grad(call(*leaves).sum(), leaves)
        right = results([q, k, v, torch.ones_like(grad)], whole())[1:]
        assert_same(list(grads), right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", ["one-document", "ends-before", "ends-behind"])
@pytest.mark.parametrize("kernel,window", [("sdpa", None), ("blocked", 100), ("tiles", 100)])
def test_no_more_is_lost_than_by_plain_products(
    kernel: str, window: int | None, rows: str, dtype: torch.dtype
) -> None:
    if kernel == "tiles" and dtype != torch.float32:
        pytest.skip("tiles are of fp32 alone")
    documents = documents_of(rows)
    inputs = drawn(dtype=dtype)
    seen = (documents or Documents.from_lengths([[KEYS]] * 2)).visible(window)[:, None, BEFORE:]

    def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.repeat_interleave(4 // x.shape[2], 2).permute(1, 2, 0, 3) for x in (q, k, v))
        scores = (q @ k.mT * 0.3).masked_fill(~seen, float("-inf"))
        return (scores.float().softmax(-1).to(dtype) @ v).permute(2, 0, 1, 3)

    def by_tiles(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tiles.attend_tiles(q, k, v, window=window or 0, documents=documents, scale=0.3)

    how = {"documents": documents, "window": window}
    truth = results([x.double() for x in inputs], whole(**how))
    found = results(inputs, by_tiles if kernel == "tiles" else last(kernel, **how))
    for ours, plain, true in zip(found, results(inputs, products), truth, strict=True):
        assert error(ours.double(), true) <= 2 * error(plain.double(), true)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("queries", [QUERIES, KEYS], ids=["last", "all"])
def test_halves_are_the_forward_and_the_backward(queries: int, rows: str) -> None:
    inputs, documents = drawn(), documents_of(rows)
    right = results(inputs, whole(documents=documents), queries)
    q, k, v, grad = (x.clone().requires_grad_() for x in inputs)
    q, grad = q[-queries:], grad[-queries:]
    spec = AttentionSpec(scale=0.3, documents=documents, before=KEYS - queries)
    for kernel in ("auto", "sdpa", "blocked"):
        apart, asked = halves(q, k, spec, kernel) or pytest.fail("has none")
        out, kept = apart.forward(q, k, v, asked)
        again = (k.clone(), v.clone())  # gathered anew
        found = [out, *apart.backward(grad, q, *again, out, kept, asked)]
        assert not any(x.requires_grad for x in (*found, *kept))
        assert sum(x.numel() for x in kept) == queries * 2 * 4  # one number for each query and head
        assert_same(found, right)
    assert halves(q, k, spec, "reference") is None
    windowed = AttentionSpec(scale=0.3, window=5, before=KEYS - queries)
    assert halves(q, k, windowed, "blocked") is None
    with pytest.raises(ConfigError, match="kernels=sdpa has no window"):
        halves(q, k, windowed, "sdpa")


class Largest(TorchDispatchMode):
    """Keeps the bytes of the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else (made,):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("lengths", [None, [3000, 200, 100, 1796], [2500, *[16] * 100, 996]])
def test_no_mask_of_queries_and_keys_is_made(lengths: list[int] | None) -> None:
    keys, queries = 5096, 2048
    q, k, v, grad = drawn((2, 1), torch.float32, keys, rows=1)
    documents = None if lengths is None else Documents.from_lengths([lengths])
    spec = AttentionSpec(scale=0.3, documents=documents, before=keys - queries)
    q, grad = q[-queries:], grad[-queries:]
    apart, asked = halves(q, k, spec) or pytest.fail("has none")
    with Largest() as largest:
        results([q, k, v, grad], last("auto", documents=documents), queries)
        out, kept = apart.forward(q, k, v, asked)
        apart.backward(grad, q, k, v, out, kept, asked)
    assert 2**18 < largest.bytes < last_queries.LARGEST_MASK < queries * keys * 4


def test_where_no_kernel_has_the_rule_masks_are_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = drawn()
    monkeypatch.setattr(last_queries, "LARGEST_MASK", 7 * KEYS * 8)
    masks: list[tuple[int, ...]] = []
    make = last_queries.additive
    monkeypatch.setattr(
        last_queries, "additive", lambda seen, dtype: masks.append(seen.shape) or make(seen, dtype)
    )

    def banded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        return last_queries._in_bands(q, k, v, 0.3).permute(2, 0, 1, 3)

    assert_same(results(inputs, banded), results(inputs, whole()))
    assert max(shape[1] for shape in masks) == 7 and sum(s[1] for s in masks) == QUERIES


def test_the_last_tokens_of_documents_are_documents() -> None:
    documents = Documents.from_lengths([[4, 3, 3], [1, 9]])
    cut = documents.stretch(5, 10)
    assert cut.starts.tolist() == [[0, 0, 2, 2, 2], [0] * 5]
    assert cut.spans() == Documents(cut.starts).spans()
    assert documents.stretch(5, 10) is cut and documents.stretch(0, 10) is documents


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor, window: int | None, scale: float
) -> Tensor:
    """FlashAttention's rule for packed documents: the last query of each against its last key."""
    outs = []
    edges = zip(of_q.tolist(), of_q.tolist()[1:], of_k.tolist(), of_k.tolist()[1:], strict=False)
    for q0, q1, k0, k1 in edges:
        assert 0 < q1 - q0 <= k1 - k0
        query = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        key = torch.arange(k1 - k0)
        seen = (key <= query) & (key > query - (window or k1))
        keys, values = (
            x[k0:k1].repeat_interleave(q.shape[1] // x.shape[1], 1).transpose(0, 1) for x in (k, v)
        )
        scores = (q[q0:q1].transpose(0, 1) @ keys.mT * scale).masked_fill(~seen, float("-inf"))
        outs.append((scores.softmax(-1) @ values).transpose(0, 1))
    assert q1 == len(q) and k1 == len(k) == len(v)
    return torch.cat(outs)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """torch's FlashAttention, and FlashAttention 3 and 4, by the rule above. Gives the longest
    documents of queries and of keys that each call was told."""
    told: list[tuple[int, int]] = []

    def check(of_q: Tensor, of_k: Tensor, longest_q: int, longest_k: int) -> None:
        assert of_q.dtype == of_k.dtype == torch.int32
        assert longest_q == of_q.diff().max() and longest_k == of_k.diff().max()
        told.append((longest_q, longest_k))

    def windowed(left: int | None) -> int | None:
        return None if left in (None, -1) else left + 1

    def of_torch(q: Any, k: Any, v: Any, *packing: Any, scale: Any, window_size: Any) -> Tensor:
        check(*packing)
        assert window_size[1] == 0
        return packed_attention(q, k, v, *packing[:2], windowed(window_size[0]), scale)

    def of_package(q: Any, k: Any, v: Any, **how: Any) -> Tensor:
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        check(*(how[name] for name in names))
        edges = (how["cu_seqlens_q"], how["cu_seqlens_k"])
        window = windowed(how["window_size"][0])
        return packed_attention(q, k, v, *edges, window, how["softmax_scale"])

    def forward(q: Any, k: Any, v: Any, *rest: Any, **how: Any) -> tuple[Any, ...]:
        *packing, dropout, causal = rest
        left, right, scale = (how[x] for x in ("window_size_left", "window_size_right", "scale"))
        assert dropout == 0.0 and causal == (left == -1) and right == 0
        check(*packing)
        out = packed_attention(q, k, v, *packing[:2], windowed(left), scale)
        return out, torch.zeros(q.shape[1], len(q)), None, None, None

    def backward(grad: Any, q: Any, k: Any, v: Any, out: Any, sums: Any, *rest: Any, **how: Any):  # type: ignore[no-untyped-def]
        *packing, dropout, causal, _, _ = rest
        assert sums.shape == (q.shape[1], len(q)) and out.shape == grad.shape == q.shape
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            again = forward(*leaves, *packing, dropout, causal, **how)[0]
        return torch.autograd.grad(again, leaves, grad)

    monkeypatch.setattr(varlen, "refusal", lambda *where: None)
    monkeypatch.setattr(flash, "refusal", lambda *where: None)
    monkeypatch.setattr(varlen, "_shares_heads", lambda *where: True)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", of_torch)
    monkeypatch.setattr(varlen, "_parameters", lambda: frozenset({"window_size"}))
    monkeypatch.setattr(flash, "_function", lambda name: of_package)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    yield told
    varlen.plain_boundaries.cache_clear()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("window", [None, 1, QUERIES + 1, 3 * QUERIES + 1])
def test_packed_rows_reach_flash_attention_with_their_own_keys(
    window: int | None, rows: str, packages: list[tuple[int, int]]
) -> None:
    inputs, documents = drawn(), documents_of(rows)
    how = {"documents": documents, "window": window}
    right = results(inputs, whole(**how))
    for kernel in ("varlen", "fa3", "fa4"):
        assert_same(results(inputs, last(kernel, **how)), right)
    q, k, v, grad = inputs
    q, grad = q[BEFORE:], grad[BEFORE:]
    spec = AttentionSpec(scale=0.3, before=BEFORE, **how)  # type: ignore[arg-type]
    apart, asked = halves(q, k, spec, "varlen") or pytest.fail("has none")
    out, kept = apart.forward(q, k, v, asked)
    assert_same([out, *apart.backward(grad, q, k, v, out, kept, asked)], right)
    needed = KEYS if window is None else min(KEYS, QUERIES + window - 1)
    assert all(queries <= QUERIES and keys <= needed for queries, keys in packages)


@pytest.mark.parametrize("window", [None, 1, 2, 100, 128, 129, 300])
@pytest.mark.parametrize("before", [1, 127, 128, 200, 512])
def test_flex_looks_at_the_blocks_that_a_dense_mask_would_show(
    before: int, window: int | None
) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    seq = 640
    reach = window or seq
    for rows in ([], [[128, 512], [639, 1], [before + 1, 639 - before], [640]]):
        starts = Documents.from_lengths(rows).starts if rows else torch.zeros(1, seq).long()
        wanted = create_block_mask(
            lambda row, head, query, key, starts=starts: (
                (key <= query + before)
                & (key > query + before - reach)
                & (key >= starts[row, query + before])
            ),
            len(starts),
            None,
            seq - before,
            seq,
            device="cpu",
        )
        found = flex._block_mask(window, seq, starts if rows else None, CPU, before)
        assert found.seq_lengths == wanted.seq_lengths
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), name
        for name in ("kv_indices", "full_kv_indices", "q_indices", "full_q_indices"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), name
        assert torch.equal(found.to_dense(), wanted.to_dense())
        first, own = torch.tensor(0), torch.tensor(before)
        assert found.mask_mod(first, first, first, own)
        assert not found.mask_mod(first, first, first, own + 1)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled for the CPU alone")
def test_flex_on_cpu_gives_the_last_rows() -> None:
    q, k, v, _ = drawn(dtype=torch.float32)
    for window, rows in ((50, "many"), (None, "one-document")):
        how = {"window": window, "documents": documents_of(rows)}
        with torch.no_grad():
            found = last("flex", **how)(q[BEFORE:], k, v)
            assert error(found, whole(**how)(q[BEFORE:], k, v)) < 1e-5


def test_kernels_whose_mask_lies_against_the_first_key_refuse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v, _ = drawn()
    for kernel in ("cudnn", "cudnn_frontend"):
        with pytest.raises(ConfigError) as refused:
            last(kernel)(q[BEFORE:], k, v)
        assert str(refused.value) == (
            f"kernels={kernel} has no keys before the first query (before=240). Use blocked, sdpa "
            "or flex."
        )


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)], ids=["turing", "hopper"])
def test_auto_and_measurements_never_end_without_a_kernel(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    several = Documents.from_lengths([[60, 40]])
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    for device in (CPU, torch.device("cuda:0")):
        for dtype, head_dim in ((dtype, n) for dtype in dtypes for n in (8, 20, 64, 512)):
            for window, documents in ((None, None), (None, several), (5, None), (5, several)):
                name = choose(window, 100, documents, device, dtype, head_dim, 30)
                spec = AttentionSpec(scale=1.0, window=window, documents=documents, before=30)
                place = Place(device, dtype, head_dim)
                assert REGISTRY[name].refusal(spec, place) is None
                names = measured(window, device, dtype, head_dim, 30)
                assert names and not {"cudnn", "cudnn_frontend"} & set(names)
    assert choose(5, 35, None, CPU, torch.float32, 64, 31) == "blocked"
    assert choose(None, 35, None, CPU, torch.float32, 64, 31) == "sdpa"


def test_a_checkpoint_s_kernel_that_cannot_do_it_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cudnn, "refusal", lambda *where: None)
    device, bf16 = torch.device("cuda:0"), torch.bfloat16
    kept = ChosenKernels(device="cuda", full="cudnn", windowed="cudnn_frontend", length=64)
    resolve = choice.resolve_kernels
    same = resolve(KernelConfig(), device, bf16, 64, kept)
    assert (same.full, same.windowed) == ("cudnn", "cudnn_frontend")
    cut = resolve(KernelConfig(), device, bf16, 64, kept, last_queries=("windowed",))
    assert (cut.full, cut.windowed) == ("cudnn", "varlen")


def test_kernels_are_measured_with_the_keys_that_come_before() -> None:
    work = choice.Workload(1, 64, 2, 1, 16, torch.float32, CPU, documents=True, before=2 * 2048)
    found: list[Any] = []
    choice.measure(["sdpa", "reference"], None, work, lambda run, _: found.append(run()) or 1.0)
    one, several, *of_reference = found  # rows of one document, and of several
    assert len(one["output"]) == len(one["dq"]) == 64 and len(one["dk"]) == 64 + 4096
    assert not several["dk"][:2048].any() and one["dk"][:2048].any()
    for ours, right in zip((one, several), of_reference, strict=True):
        choice.demand_agreement(ours, right, "the reference's")


def test_short_neighbours_share_a_call_with_the_first_query_s_document() -> None:
    documents = Documents.from_lengths([[700, 100, 100, 500, 600]])
    assert [tuple(run) for run in sdpa.runs(documents, 750)] == [
        (0, 700, 900),
        (0, 900, 1400),
        (0, 1400, 2000),
    ]
    masks = [mask for _, mask in sdpa.masked_runs(documents, torch.float32, 750)[0]]
    assert masks[0] is not None and masks[0].shape == (1, 150, 200) and masks[1:] == [None, None]
