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

    def run(window: int, dtype: torch.dtype) -> torch.Tensor:
        torch.manual_seed(1)
        q, k, v = (torch.randn(700, 1, n, 64, dtype=dtype) for n in (3, 1, 1))
        return attend(q, k, v, AttentionSpec(window=window, scale=0.1), "blocked")

    run(32, torch.float32), run(512, torch.float64), run(512, torch.bfloat16)
    assert called == []
    fast = run(512, torch.float32)
    assert called == [512]
    monkeypatch.setattr(tiles, "SMALLEST", 2**40)
    slow = run(512, torch.float32)
    assert called == [512]
    assert (fast - slow).norm() <= 2e-6 * slow.norm()
