"""Windowed attention by tiles of products against the reference, in float64, and who gets it."""

import pytest
import torch

from megahybrid.model.kernels import AttentionSpec, attend, tiles
from megahybrid.model.kernels.documents import Documents

BOUND = 1e-10


def heads(seq: int, rows: int, counts: tuple[int, int], dim: int) -> list[torch.Tensor]:
    torch.manual_seed(seq + rows)
    shapes = [(seq, rows, count, dim) for count in (counts[0], counts[1], counts[1])]
    # Values are a slice of a wider output in a layer, so their rows lie apart.
    return [
        torch.randn(*shape[:3], dim + 5, dtype=torch.float64)[..., 2 : 2 + dim].requires_grad_()
        for shape in shapes
    ]


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 47, 48, 49, 96, 199])
@pytest.mark.parametrize(
    "seq, lengths",
    [(1, None), (47, None), (48, None), (200, None)]
    + [(200, lengths) for lengths in ((7, 90, 103), (1, 198, 1), (96, 104))],
)
def test_outputs_and_gradients_are_the_reference_s(
    seq: int, window: int, lengths: tuple[int, ...] | None
) -> None:
    documents = None
    if lengths is not None:
        documents = Documents.from_lengths([list(lengths), [seq]])
    inputs = heads(seq, 2, (6, 2), 8)
    grad = torch.randn(seq, 2, 6, 8, dtype=torch.float64)
    where = {"window": window, "documents": documents, "scale": 0.3}
    ours = tiles.attend_tiles(*inputs, **where)  # type: ignore[arg-type]
    exact = attend(*inputs, AttentionSpec(**where), "reference")  # type: ignore[arg-type]
    pairs = zip(
        (ours, *torch.autograd.grad(ours, inputs, grad)),
        (exact, *torch.autograd.grad(exact, inputs, grad)),
        strict=True,
    )
    for mine, theirs in pairs:
        assert mine.shape == theirs.shape
        assert (mine - theirs).norm() <= BOUND * theirs.norm() + 1e-12


@pytest.mark.parametrize("window", [1, 17, 49, 199])
@pytest.mark.parametrize("before, lengths", [(0, None), (41, None), (41, (7, 90, 103))])
def test_learned_sinks_and_their_gradients_are_the_reference_s(
    window: int, before: int, lengths: tuple[int, ...] | None
) -> None:
    """Sinks from a hundredth of a query's mass to nearly all; the reference's are held to the
    explicit softmax in test_sinks."""
    documents = None if lengths is None else Documents.from_lengths([list(lengths), [200]])
    q, k, v = heads(200, 2, (4, 2), 8)
    sinks = torch.tensor([-1.0, 1.0, 3.0, 9.0], dtype=torch.float64, requires_grad=True)
    inputs = [q[before:], k, v, sinks]
    where = {"window": window, "documents": documents, "scale": 0.3}
    ours = tiles.attend_tiles(*inputs[:3], sinks=sinks, **where)  # type: ignore[arg-type]
    spec = AttentionSpec(sinks=sinks, before=before or None, **where)  # type: ignore[arg-type]
    exact = attend(*inputs[:3], spec, "reference")  # type: ignore[arg-type]
    grad = torch.randn(ours.shape, dtype=torch.float64)
    pairs = zip(
        (ours, *torch.autograd.grad(ours, inputs, grad)),
        (exact, *torch.autograd.grad(exact, inputs, grad)),
        strict=True,
    )
    for mine, theirs in pairs:
        assert mine.shape == theirs.shape
        assert (mine - theirs).norm() <= 1e-12 * theirs.norm()


def test_a_key_one_beyond_the_window_changes_nothing() -> None:
    q, k, v = (x.detach() for x in heads(300, 1, (2, 1), 8))
    with torch.no_grad():
        before = tiles.attend_tiles(q, k, v, window=64, documents=None, scale=0.3)
        k[100], v[100] = 50.0, 50.0
        after = tiles.attend_tiles(q, k, v, window=64, documents=None, scale=0.3)
    changed = (before != after).flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == list(range(100, 164))


def test_a_document_s_keys_are_not_read_by_the_next() -> None:
    q, k, v = (x.detach() for x in heads(300, 1, (2, 1), 8))
    documents = Documents.from_lengths([[150, 150]])
    unread = 150 // tiles.ALIGNED * tiles.ALIGNED
    k[:unread], v[:unread] = float("nan"), float("nan")
    out = tiles.attend_tiles(q, k, v, window=300, documents=documents, scale=0.3)
    tile_behind = -(-150 // tiles.TILE) * tiles.TILE
    assert out[tile_behind:].isfinite().all() and not out[:tile_behind].isfinite().any()


def test_large_windows_in_fp32_on_a_cpu_go_by_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    plain = tiles.attend_tiles
    monkeypatch.setattr(
        tiles, "attend_tiles", lambda *a, **b: called.append(b["window"]) or plain(*a, **b)
    )

    def run(window: int, dtype: torch.dtype, sinks: float | None = None) -> torch.Tensor:
        torch.manual_seed(1)
        q, k, v = (torch.randn(700, 1, n, 64, dtype=dtype) for n in (3, 1, 1))
        learned = None if sinks is None else torch.full((3,), sinks)
        return attend(q, k, v, AttentionSpec(window=window, scale=0.1, sinks=learned), "blocked")

    run(32, torch.float32), run(512, torch.float64), run(512, torch.bfloat16)
    assert called == []
    fast = run(512, torch.float32), run(512, torch.float32, 4.0)
    assert called == [512, 512]
    monkeypatch.setattr(tiles, "SMALLEST", 2**40)
    slow = run(512, torch.float32), run(512, torch.float32, 4.0)
    assert called == [512, 512]
    for mine, other in zip(fast, slow, strict=True):
        assert (mine - other).norm() <= 2e-6 * other.norm()
    # A sink far below the scores takes nothing: -1e9 is how released models switch them off.
    off = run(512, torch.float32, -1e9)
    assert (off - slow[0]).norm() <= 2e-6 * slow[0].norm()
