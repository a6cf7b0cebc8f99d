"""Loss by position over documents: all of them, and the same ones at every position."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megahybrid.evaluate.by_document import ratio_interval
from megahybrid.evaluate.loss_by_document import loss_by_document
from megahybrid.ledger import PositionBucket
from megahybrid.parallel.mesh import Axis

LONGEST = 512
# Documents that reach far are harder here, and no token is harder for standing far out.
SIZES = (*(LONGEST,) * 3, *(300,) * 6, *(200,) * 3, *(40,) * 30)
TEXT = torch.tensor([0, 3])  # bytes of ids 0 and 1


def rows() -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """A row for each document; tokens hold how hard it is, the last one has no target."""
    found = []
    for number, size in enumerate(SIZES):
        tokens = torch.full((1, LONGEST), 1 + size + number)
        targets = torch.where(torch.arange(LONGEST)[None] < size - (size < LONGEST), 1, -100)
        found.append((torch.tensor([number]), tokens, targets, torch.zeros_like(tokens)))
    return found


def hardness(tokens: Tensor, targets: Tensor, starts: Tensor) -> Tensor:
    return torch.where(targets == -100, 0, tokens.double() / 100)


def score(sizes: tuple[int, ...] = SIZES):  # type: ignore[no-untyped-def]
    asked = (Axis.single("data"), torch.device("cpu"))
    mine = rows()[: len(sizes)]
    return loss_by_document(hardness, mine, sizes, LONGEST, *asked, token_bytes=TEXT)


def test_the_same_documents_hold_a_curve_flat_that_others_would_bend() -> None:
    found = score()
    everyone = {bucket.start: bucket.loss for bucket in found.by_position}
    assert everyone[256] > everyone[128] > everyone[16] + 1  # it looks as if far were hard
    same = found.same_documents
    assert same is not None
    # Nine documents reach 256, three reach 512; nine need 29 tokens each for 256 targets.
    assert [(one.start, one.stop) for one in same] == [
        (0, 32), (32, 64), (64, 128), (128, 256),
    ]  # fmt: skip
    chosen = [(1 + size + n) / 100 for n, size in enumerate(SIZES) if size >= 256]
    for one in same:
        assert one.documents == 9 and one.tokens == 9 * (one.stop - one.start)
        assert one.loss == pytest.approx(sum(chosen) / 9, rel=1e-12)
        counts = torch.full((9,), float(one.stop - one.start)).numpy()
        interval = ratio_interval(torch.tensor(chosen).numpy() * counts, counts)
        assert (one.low, one.high) == pytest.approx(interval, rel=1e-6)
    assert [one.documents for one in found.by_position][-2:] == [12, 9]
    assert found.by_position[-1].low is None
    assert found.bytes == 3 * found.tokens
    assert found.bits_per_byte == pytest.approx(found.bits_per_token / 3)


def test_fewer_documents_than_are_enough_are_all_kept_and_counted() -> None:
    same = score(SIZES[:5]).same_documents
    assert same is not None and same[-1].stop == 256
    assert {one.documents for one in same} == {5}
    assert score(SIZES[:0]).same_documents == ()
    alone = score(SIZES[:1]).same_documents
    assert alone is not None and alone[-1].loss == pytest.approx((1 + LONGEST) / 100)
    assert replace(alone[-1], loss=None) == PositionBucket(256, 512, 256, None, 1, None, None)
