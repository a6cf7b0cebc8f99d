"""The questions to one scheme on its kernel, and the rows on which they are asked."""

from dataclasses import dataclass, replace
from typing import assert_never

import torch

from megahybrid.config.attention import AttentionScheme, Nope, Rope
from megahybrid.model.kernels import choose, flex, sdpa
from megahybrid.model.kernels.blocked import block_and_reach
from megahybrid.model.kernels.chosen import kernels_of_views
from megahybrid.model.selftest import laws
from megahybrid.model.selftest.comparison import compare, draw, fill_learned, queries_of
from megahybrid.model.selftest.subject import Contexts, HeadShape, HeadsOnly, Rows

# Of 192 tokens the last 64 are half of a block of keys: cuDNN's backward under a mask reads the
# other half as keys of score 0, and gives NaN where all others are low
# (github.com/pytorch/pytorch/issues/196678).
TOGETHER = Rows.of([30, 1, 66, 95], [192])
BLOCKS = 5  # of queries beyond a window
FULL_LENGTH = 2 * sdpa.SHARED_TOKENS + 72  # beyond each special case, no multiple of any block
# Products of a forward, and scores that the expected numbers take: a second or two of one CPU core,
# and of a GPU some ten milliseconds and a gigabyte. Beyond them fewer heads are asked at a scheme's
# own length, and then a shorter window; all heads are asked at TOGETHER's.
PRODUCTS = {"cpu": 6e8, "cuda": 1e12}
SCORES = {"cpu": 1e7, "cuda": 4e7}


@dataclass(frozen=True)
class OneScheme:
    """The questions to one scheme on its kernel."""

    scheme: AttentionScheme
    kernel: str
    shape: HeadShape
    contexts: Contexts
    compiler: str | None
    whole: bool

    def alone(self) -> None:
        """Laws, then numbers, at a length of the scheme's own: its window and some blocks, or more
        than any kernel treats as a special case."""
        scheme, shape = self.scheme, self.shape
        for one in self.views():
            one.obeys_laws()
        scheme, rows, fewer = reduced(scheme, self.kernel, shape)
        for each in (rows.joined(), rows):
            self.numbers(scheme, fewer, each)

    def views(self) -> "list[OneScheme]":
        """Return the questions to each view of the keys by itself: this one where it has one."""
        views = self.scheme.views()
        kernels = kernels_of_views(self.kernel)[-len(views) :]
        pairs = zip(views, kernels, strict=True)
        return [replace(self, scheme=view, kernel=kernel) for view, kernel in pairs]

    def obeys_laws(self) -> None:
        """Which keys are seen, by what they are rotated, and how scores are scaled."""
        scheme, shape = self.scheme, self.shape
        rows = own_rows(scheme.reach, self.kernel)
        fewer = affordable(shape, rows, scheme.reach, forward_only=True)
        seeing = HeadsOnly(fewer, laws.bare(scheme), self.kernel)
        for each in (rows.joined(), rows):
            self.rotates(shape, each)
            with torch.no_grad():
                laws.sees_its_keys(seeing, fewer, self.contexts.of(each), each)
        laws.scales_its_scores(scheme, shape, self.kernel)
        laws.scales_its_queries(scheme, shape, rows.length)

    def beside_others(self) -> None:
        """With all heads and in a context shared with the other schemes: numbers once more, as
        written and as compiled."""
        compilers = [None] if self.compiler is None else [None, self.compiler]
        for rows in (TOGETHER.joined(), TOGETHER):
            context = self.contexts.of(rows)
            for one in self.views():
                bare = HeadsOnly(self.shape, laws.bare(one.scheme), one.kernel)
                laws.stays_finite(bare, self.shape, context, rows)
                one.rotates(self.shape, rows)
            for compiler in compilers:
                self.numbers(self.scheme, self.shape, rows, compiler)
        for one in self.views():
            one.is_blind()

    def is_blind(self) -> None:
        """A layer without a rotation knows no positions."""
        match self.scheme.position:
            case Rope():
                pass
            case Nope():
                block = self.block(self.scheme, self.shape, TOGETHER.length)
                laws.is_blind_to_position(block, self.shape, self.contexts)
            case other:
                assert_never(other)

    def rotates(self, shape: HeadShape, rows: Rows) -> None:
        """The table of the rotation, where there is one."""
        match self.scheme.position:
            case Rope() as rope:
                laws.rotates_by_its_frequencies(rope, shape, self.contexts.of(rows), rows)
            case Nope():
                pass
            case other:
                assert_never(other)

    def numbers(
        self, scheme: AttentionScheme, shape: HeadShape, rows: Rows, compiler: str | None = None
    ) -> None:
        """Output and gradients, of a block without gradients too where it is compiled."""
        block, context = self.block(scheme, shape, rows.length), self.contexts.of(rows)
        drawn = draw(scheme, shape, rows, torch.Generator().manual_seed(20250118))
        if compiler is not None:
            block.compile_as(compiler, self.whole)
            compare(block, shape, context, rows, drawn, evaluates=True)
        compare(block, shape, context, rows, drawn)

    def block(self, scheme: AttentionScheme, shape: HeadShape, length: int) -> HeadsOnly:
        """Return a block with weights of its own, for rows of so many tokens."""
        block = HeadsOnly(shape, scheme, self.kernel)
        fill_learned(block, shape, length, torch.Generator().manual_seed(7))
        return block

    def kernel_name(self) -> str:
        """Return the kernel asked for, or the one that `auto` means here."""
        if self.kernel != "auto":
            return self.kernel
        window, shape = self.scheme.reach, self.shape
        length = own_rows(window, self.kernel).length
        where = (shape.device, shape.dtype, shape.head_dim)
        return choose(window, length, None, *where, sinks=self.scheme.sink)


def own_rows(window: int | None, kernel: str) -> Rows:
    """Two rows cut differently: a document longer than the window and short ones, down to a single
    token, so that borders lie in every block of queries; the last block is not full."""
    if window is None:
        block, long, length = 128, sdpa.SHARED_TOKENS + 88, FULL_LENGTH
    else:
        block = max(block_and_reach(window)[0], flex.BLOCK if "flex" in kernel else 0)
        long, length = window + block + block // 2, window + BLOCKS * block + block // 3 + 1
    end = [5, 1, 3]
    first = [long, *_short(length - long - sum(end), block), *end]
    before = _short(2 * block, block)
    long -= block // 2
    second = [*before, long, *_short(length - sum(before) - long - sum(end), block), *end]
    return Rows.of(first, second)


def _short(total: int, block: int) -> list[int]:
    """Documents of less than a block that fill `total` tokens."""
    sizes = [block // 2 + 3, 1, block // 3 + 1, block - 7, 2]
    found: list[int] = []
    while sum(found) < total:
        found.append(min(sizes[len(found) % len(sizes)], total - sum(found)))
    return found


def reduced(
    scheme: AttentionScheme, kernel: str, shape: HeadShape, share: float = 1.0
) -> tuple[AttentionScheme, Rows, HeadShape]:
    """The scheme with the widest window whose gradients are affordable, and the heads for it;
    `share`: for a part of the budget."""
    while True:
        rows = own_rows(scheme.reach, kernel)
        fewer = affordable(shape, rows, scheme.reach)
        fits = _fits(fewer, rows, scheme.reach, share=share)
        if fits or scheme.reach is None or scheme.reach <= 256:
            return _ending_within(scheme, rows), rows, fewer
        scheme = scheme.with_reach(scheme.reach // 2 + 1)


def _ending_within(scheme: AttentionScheme, rows: Rows) -> AttentionScheme:
    """The scheme with a near view whose window ends within rows that a far view without one has."""
    near = scheme.near
    if near is None or near.window is None or near.window <= rows.length // 4:
        return scheme
    return scheme.model_copy(update={"near": near.model_copy(update={"window": rows.length // 4})})


def affordable(
    shape: HeadShape, rows: Rows, window: int | None, forward_only: bool = False
) -> HeadShape:
    """Return as many of the heads as the budget allows, one at least."""
    while not _fits(shape, rows, window, forward_only):
        smaller = shape.smaller()
        if smaller is None:
            break
        shape = smaller
    return shape


def _fits(
    shape: HeadShape,
    rows: Rows,
    window: int | None,
    forward_only: bool = False,
    share: float = 1.0,
) -> bool:
    kind = "cuda" if shape.device.type == "cuda" else "cpu"
    length, count = rows.length, len(rows.documents)
    seen = length / 2 if window is None else window + block_and_reach(window)[0]
    products = count * length * seen * shape.head_dim * shape.heads
    scores = 0 if forward_only else count * len(queries_of(rows, window)) * length * shape.heads
    within = share * PRODUCTS[kind] * (4 if forward_only else 1)
    return products <= within and scores <= share * SCORES[kind]
