"""Every kernel against the reference, and the reference against the rule written with loops."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megahybrid.errors import ConfigError
from megahybrid.model.kernels import AttentionSpec, attend, choose, cudnn_frontend, flex, sdpa
from megahybrid.model.kernels.documents import Documents
from tests.parallel.compare import EXACT, error

CPU = torch.device("cpu")
ROWS = {
    "one-row": (1, None),
    "rows": (3, None),
    "documents": (1, [[30, 1, 5, 400, 164]]),
    "rows-of-documents": (2, [[600], [1, 1, 63, 64, 471]]),
}


def draw(
    seq: int, batch: int, heads: int, kv_heads: int, head_dim: int = 16, **options: object
) -> tuple[Tensor, ...]:
    """q, k, v and a gradient of the output."""
    generator = torch.Generator().manual_seed(seq + batch)
    counts = (heads, kv_heads, kv_heads, heads)
    drawn = (
        torch.randn(seq, batch, n, head_dim, generator=generator, dtype=torch.float64)
        for n in counts
    )
    return tuple(x.to(**options).requires_grad_() for x in drawn)  # type: ignore[call-overload]


def outputs(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, **how: object) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    kernel = how.pop("kernel", "auto")
    out = attend(q, k, v, AttentionSpec(scale=0.3, **how), kernel)  # type: ignore[arg-type]
    return [out, *torch.autograd.grad(out, (q, k, v), grad)]


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error of the four; absolute where the truth is zero, as with window 1."""
    pairs = [
        (a.detach().double(), b.detach().double()) for a, b in zip(found, expected, strict=True)
    ]
    return max(float((a - b).norm() / b.norm().clamp(min=1)) for a, b in pairs)


def plain_products(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, window: int | None, documents: Documents | None
) -> list[Tensor]:
    """Attention by two products in the input dtype and an fp32 softmax: what rounding costs."""
    seq, batch, heads, _ = q.shape
    one = Documents(torch.zeros(batch, seq, dtype=torch.int64, device=q.device))
    hidden = ~(documents or one).visible(window)[:, None]
    across, keys, values = (
        x.repeat_interleave(heads // x.shape[2], 2).permute(1, 2, 0, 3) for x in (q, k, v)
    )
    scores = (across @ keys.transpose(-1, -2) * 0.3).masked_fill(hidden, float("-inf"))
    out = (scores.float().softmax(-1).to(q.dtype) @ values).permute(2, 0, 1, 3)
    return [out, *torch.autograd.grad(out, (q, k, v), grad)]


def judged_by_rounding(
    rounded: tuple[Tensor, ...], kernel: str, window: int | None, documents: Documents | None
) -> None:
    """Asserts that the kernel's error against float64 is at most twice that of plain products."""
    wide = [x.detach().double().requires_grad_() for x in rounded]
    truth = outputs(*wide, kernel="reference", window=window, documents=documents)
    found = outputs(*rounded, kernel=kernel, window=window, documents=documents)
    plain = plain_products(*rounded, window, documents)  # type: ignore[arg-type]
    for a, b, true in zip(found, plain, truth, strict=True):
        true = true.detach()
        if true.norm() > 1e-6:
            assert error(a.detach().double(), true) <= 2 * error(b.detach().double(), true)


def test_reference_is_the_softmax_over_visible_keys_written_with_loops() -> None:
    q, k, v = (x.detach() for x in draw(9, 2, 4, 2, 3)[:3])
    documents = Documents.from_lengths([[4, 1, 4], [9]])
    out = attend(q, k, v, AttentionSpec(window=3, documents=documents, scale=0.7), "reference")
    for row, begins in enumerate(([0] * 4 + [4] + [5] * 4, [0] * 9)):
        for i in range(9):
            keys = [j for j in range(9) if begins[i] <= j <= i and i - j < 3]
            for head in range(4):
                scores = [0.7 * float(q[i, row, head] @ k[j, row, head // 2]) for j in keys]
                total = sum(math.exp(score) for score in scores)
                wanted = sum(
                    math.exp(score) / total * v[j, row, head // 2]
                    for score, j in zip(scores, keys, strict=True)
                )
                assert torch.allclose(out[i, row, head], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("window", [1, 2, 64, 65, 129, 301, 599, 600, 4096])
def test_blocked_equals_the_reference_forward_and_backward(window: int, rows: str) -> None:
    batch, lengths = ROWS[rows]
    documents = None if lengths is None else Documents.from_lengths(lengths)
    tensors = draw(600, batch, 4, 2)
    how = {"window": window, "documents": documents}
    found = outputs(*tensors, kernel="blocked", **how)
    assert worst(found, outputs(*tensors, kernel="reference", **how)) < EXACT


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "heads", [(4, 4), (4, 2), (6, 1)], ids=lambda heads: f"heads{heads[0]}-kv{heads[1]}"
)
def test_sdpa_equals_the_reference_forward_and_backward(heads: tuple[int, int], rows: str) -> None:
    batch, lengths = ROWS[rows]
    documents = None if lengths is None else Documents.from_lengths(lengths)
    tensors = draw(600, batch, *heads)
    how = {"window": None, "documents": documents}
    found = outputs(*tensors, kernel="sdpa", **how)
    assert worst(found, outputs(*tensors, kernel="reference", **how)) < EXACT


@given(st.data())
def test_windowed_query_sees_exactly_window_keys(data: st.DataObject) -> None:
    window = data.draw(st.integers(1, 200), "window")
    lengths = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=5), "documents")
    seq = sum(lengths)
    kernel = data.draw(st.sampled_from(["auto", "blocked", "reference"]), "kernel")
    documents = None if len(lengths) == 1 else Documents.from_lengths([lengths])
    begins = Documents.from_lengths([lengths]).starts[0]
    # Uniform weights: the output is the mean of one-hot values, which shows every visible key.
    q = k = torch.zeros(seq, 1, 1, 8, dtype=torch.float64)
    v = torch.eye(seq, dtype=torch.float64)
    columns = []
    for first in range(0, seq, 8):
        part = torch.zeros(seq, 1, 1, 8, dtype=torch.float64)
        part[:, 0, 0, : min(8, seq - first)] = v[:, first : first + 8]
        spec = AttentionSpec(window=window, documents=documents, scale=1.0)
        out = attend(q, k, part, spec, kernel)
        columns.append(out[:, 0, 0])
    sees = torch.cat(columns, dim=1)[:, :seq] > 1e-9
    i, j = torch.arange(seq)[:, None], torch.arange(seq)
    assert torch.equal(sees, (j <= i) & (j > i - window) & (j >= begins[:, None]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kernel", ["blocked", "sdpa"])
@pytest.mark.parametrize("lengths", [None, [[100, 500]]], ids=["one-document", "documents"])
def test_fp32_and_bf16_lose_no_more_than_plain_products(
    kernel: str, lengths: list[list[int]] | None, dtype: torch.dtype
) -> None:
    documents = None if lengths is None else Documents.from_lengths(lengths)
    window = 100 if kernel == "blocked" else None
    judged_by_rounding(draw(600, 1, 4, 2, dtype=dtype), kernel, window, documents)


def test_sdpa_with_documents_needs_memory_linear_in_the_length() -> None:
    def kept(seq: int) -> int:
        """Bytes that autograd and the documents hold after a forward."""
        documents = Documents.from_lengths([[seq // 2, *[50] * (seq // 200), seq // 4]])
        tensors = draw(seq, 1, 2, 1, dtype=torch.float32)[:3]
        storages: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            attend(*tensors, AttentionSpec(documents=documents, scale=0.1))
        return sum(storages.values())

    assert kept(8000) < 2.2 * kept(4000)


def test_masks_are_made_once_per_batch_not_once_per_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    keep = Documents.keep

    def counted(self: Documents, key: object, make: Callable[[], object]) -> object:
        return keep(self, key, lambda: (made.append(key), make())[1])

    monkeypatch.setattr(Documents, "keep", counted)
    documents = Documents.from_lengths([[300, 500, 200]])
    tensors = draw(1000, 1, 2, 2)[:3]
    for _ in range(3):
        attend(*tensors, AttentionSpec(window=100, documents=documents, scale=0.1))
        attend(*tensors, AttentionSpec(documents=documents, scale=0.1))
    assert len(made) == len(set(made)) == 4  # blocked head and tail, sdpa runs, spans


def test_runs_cover_each_row_once_and_never_cut_a_document() -> None:
    documents = Documents.from_lengths([[700, 100, 100, 500, 600], [2000]])
    runs = sdpa.runs(documents)
    assert [tuple(run) for run in runs] == [
        (0, 0, 700),
        (0, 700, 900),
        (0, 900, 1400),
        (0, 1400, 2000),
        (1, 0, 2000),
    ]


def test_documents_of_given_lengths_begin_behind_one_another() -> None:
    documents = Documents.from_lengths([[2, 3], [1, 1, 3]])
    assert documents.starts.tolist() == [[0, 0, 2, 2, 2], [0, 1, 2, 2, 2]]
    assert documents.positions().tolist() == [[0, 1, 0, 1, 2], [0, 0, 0, 1, 2]]
    assert documents.visible_keys(2).tolist() == [[1, 2, 1, 2, 2], [1, 1, 1, 2, 2]]
    assert [tuple(span) for span in documents.spans()] == [
        (0, 0, 2),
        (0, 2, 5),
        (1, 0, 1),
        (1, 1, 2),
        (1, 2, 5),
    ]
    assert documents.to("cpu").spans() == documents.spans()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"kernel": "sdpa", "window": 3}, "kernels=sdpa has no window (window=3). Use blocked."),
        ({"kernel": "varlen"}, "kernels=varlen needs a CUDA device (device=cpu)."),
        ({"kernel": "flex"}, "kernels=flex has a backward on CUDA only (device=cpu)."),
        ({"kernel": "fast"}, "kernels=fast is not a kernel."),
        ({"window": 0}, "window=0 hides a query's own key."),
        ({"documents": Documents.from_lengths([[4, 3]])}, "documents cover (1, 7) (batch, seq)"),
    ],
    ids=["sdpa-window", "varlen-cpu", "flex-cpu", "unknown", "window-0", "other-documents"],
)
def test_what_a_kernel_cannot_do_is_refused(how: dict[str, object], words: str) -> None:
    q, k, v, _ = draw(8, 1, 2, 2)
    kernel = how.get("kernel", "auto")
    spec = AttentionSpec(**{"scale": 1.0, **{n: x for n, x in how.items() if n != "kernel"}})  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as refused:
        attend(q, k, v, spec, kernel)  # type: ignore[arg-type]
    assert str(refused.value).startswith(words)


def test_heads_that_do_not_share_evenly_are_refused() -> None:
    q, k, v, _ = draw(8, 1, 3, 2)
    with pytest.raises(ConfigError, match="num_kv_heads=2 does not divide num_heads=3"):
        attend(q, k, v, AttentionSpec(scale=1.0))


def test_on_cpu_windows_are_blocked_and_the_rest_is_sdpa() -> None:
    documents = Documents.from_lengths([[60, 40]])
    assert choose(50, 100, documents, CPU, torch.float32, 64) == "blocked"
    assert choose(100, 100, documents, CPU, torch.bfloat16, 64) == "sdpa"
    assert choose(None, 100, None, CPU, torch.float64, 64) == "sdpa"


CUDA_CASES = [
    ("varlen", torch.bfloat16),
    ("cudnn_frontend", torch.bfloat16),
    ("cudnn_frontend", torch.float16),
    ("flex", torch.bfloat16),
    ("flex", torch.float32),
    ("sdpa", torch.bfloat16),
    ("blocked", torch.bfloat16),
    ("blocked", torch.float32),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("kernel", "dtype"), CUDA_CASES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("window", [None, 1, 100, 129])
def test_cuda_kernels_stay_near_the_truth(
    window: int | None, rows: str, kernel: str, dtype: torch.dtype
) -> None:
    if (kernel == "sdpa") != (window is None) and kernel in ("sdpa", "blocked"):
        pytest.skip("this kernel is not for this window")
    if kernel == "cudnn_frontend":
        why_not = cudnn_frontend.refusal(torch.device("cuda"), dtype, 64)
        if why_not:
            pytest.skip(why_not)
    batch, lengths = ROWS[rows]
    documents = None if lengths is None else Documents.from_lengths(lengths).to("cuda")
    rounded = draw(600, batch, 4, 2, 64, dtype=dtype, device="cuda")
    judged_by_rounding(rounded, kernel, window, documents)


@pytest.mark.parametrize("window", [None, 1, 2, 100, 127, 128, 129, 300])
@pytest.mark.parametrize("seq", [128, 640, 700])
def test_flex_looks_at_the_blocks_that_a_dense_mask_would_show(
    seq: int, window: int | None
) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    reach = window or seq
    lengths = [[128, seq - 128], [seq - 1, 1], [60, 3, seq - 63], [seq]]
    for rows in ([], [[n for n in row if n] for row in lengths]):
        starts = Documents.from_lengths(rows).starts if rows else torch.zeros(1, seq).long()
        wanted = create_block_mask(
            lambda row, head, query, key, starts=starts: (
                (key <= query) & (key > query - reach) & (key >= starts[row, query])
            ),
            len(starts),
            None,
            seq,
            seq,
            device="cpu",
        )
        found = flex._block_mask(window, seq, starts if rows else None, CPU)
        assert found.seq_lengths == wanted.seq_lengths
        assert found.BLOCK_SIZE == wanted.BLOCK_SIZE
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            ours, theirs = getattr(found, name), getattr(wanted, name)
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype, name
        for name in ("kv_indices", "full_kv_indices", "q_indices", "full_q_indices"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), name


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="judged on CUDA above")
def test_flex_on_cpu_equals_the_reference_without_gradients() -> None:
    documents = Documents.from_lengths([[30, 170]])
    q, k, v, _ = draw(200, 1, 4, 2, 16, dtype=torch.float32)
    for window, where in ((50, documents), (None, None)):
        with torch.no_grad():
            spec = AttentionSpec(window=window, documents=where, scale=0.3)
            found, true = (attend(q, k, v, spec, kernel) for kernel in ("flex", "reference"))
        assert error(found, true) < 1e-5
