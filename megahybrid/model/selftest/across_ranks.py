"""The self-test where context ranks share rows: does each scheme see and compute over the edges of
their shards what it does in whole rows?

The questions are those to whole rows, through the exchange of each layer on the run's own axis. All
ranks ask them together, and none raises before all have asked everything.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple, assert_never

import torch

from megahybrid.config import context as exchanges
from megahybrid.config.attention import AttentionScheme, Nope, Rope
from megahybrid.config.context_plan import Part, parts_of
from megahybrid.config.counting import kv_heads_of_views
from megahybrid.config.fusion import Fuse
from megahybrid.errors import AuditError
from megahybrid.model.kernels.chosen import kernels_of_views
from megahybrid.model.row_shards import RowShards
from megahybrid.model.selftest import laws
from megahybrid.model.selftest.questions import OneScheme, own_rows, reduced
from megahybrid.model.selftest.subject import Contexts, HeadShape, HeadsOnly, Rows, Violation
from megahybrid.model.selftest.whole_rows import holder
from megahybrid.parallel.collectives import alike
from megahybrid.parallel.mesh import Axis

SHORT = 192  # tokens of a row that every rank has some of; with many ranks 8 for each segment
SHARE = 0.2  # of the budget of whole rows: every rank computes all numbers that are expected
# Borders of documents about an edge between segments, by row and edge in turn: a document ends one
# token before, at and one after it, is of one token on each side, or goes on over two edges.
BORDERS: tuple[tuple[int, ...], ...] = ((-1,), (0,), (1,), (-1, 0, 1), (), ())


def run_context_test(
    schemes: Mapping[str, AttentionScheme],
    shape: HeadShape,
    kernels: Mapping[str, str],
    shards: RowShards,
    world: Axis,
    *,
    passed: Collection[str] = (),
    short: bool = False,
) -> list[tuple[str, str, float]]:
    """(scheme, exchange, seconds) of every scheme not in `passed`, with rows that lie on context
    ranks as `shards` says; their length is of no account. Collective: every rank of `world` calls
    it alike. `kernels` holds each scheme's kernel; `short`: on short rows alone.

    What is compiled is local to a token: the self-test of whole rows asks it. Raises AuditError on
    all ranks alike, with scheme, exchange, kernel, rank and what was violated first.
    """
    report: list[tuple[str, str, float]] = []
    contexts, found = _contexts(schemes, shape, shards), None
    for name in schemes:
        if name in passed:
            continue
        began = time.perf_counter()
        crossing = _Crossing(schemes[name], kernels[name], shape, shards, contexts)
        for question in crossing.questions(short):
            try:
                with torch.enable_grad():
                    question.ask()
            except Violation as violation:
                found = found or crossing.in_words(name, violation, question, world)
        report.append((name, crossing.exchange, time.perf_counter() - began))

    def verdict() -> None:
        if found is not None:
            raise AuditError(found)

    alike(world, verdict)
    return report


def _contexts(
    schemes: Mapping[str, AttentionScheme], shape: HeadShape, shards: RowShards
) -> Contexts:
    """Contexts of all schemes, as layers share them, with an exchange for each window asked."""
    found: dict[Part, exchanges.Exchange] = {}
    for scheme in schemes.values():
        for asked in (*short_schemes(scheme, shards), scheme):
            found |= _asked_by(scheme, asked, shards)
    for scheme in schemes.values():
        if scheme.split is not None:  # a view by itself goes by its heads' exchange, or another's
            for asked in (*short_schemes(scheme, shards), scheme):
                by_part = _asked_by(scheme, asked, shards)
                for view, exchange in zip(asked.views(), by_part.values(), strict=True):
                    found.setdefault(view.reach, exchange)
    return Contexts(shape, replace(shards, exchanges=tuple(found.items())))


def _asked_by(
    scheme: AttentionScheme, asked: AttentionScheme, shards: RowShards
) -> dict[Part, exchanges.Exchange]:
    """The exchanges of a scheme's heads, for the windows that `asked` has in their place."""
    pairs = zip(parts_of(scheme), parts_of(asked), strict=True)
    return {part: shards.exchange(own) for own, part in pairs}


def sides(
    scheme: AttentionScheme, kernel: str
) -> list[tuple[AttentionScheme, AttentionScheme, str]]:
    """(what a layer does, the view that its output then is of, kernel) for each view. Fused layers
    bring their keys together for both, so that each is seen there, with all of the share."""
    views = scheme.views()
    if scheme.fuse is None:
        kernels = kernels_of_views(kernel)[-len(views) :]
        return list(zip(views, views, kernels, strict=True))
    whole = [Fuse(gate="fixed", initial=share) for share in (1.0, 0.0)]
    return [
        (scheme.model_copy(update={"fuse": fuse}), view, kernel)
        for fuse, view in zip(whole, views, strict=True)
    ]


def short_rows(shards: RowShards) -> Rows:
    """Rows whose documents end about each edge of a shard, three of them or more."""
    size = _segment(shards)
    edges = [size * number for number in range(1, _segments(shards))]
    count, stride = (3, 2) if len(edges) > 1 else (len(BORDERS), 1)
    rows = []
    for row in range(count):
        cuts = {
            edge + off
            for number, edge in enumerate(edges)
            for off in BORDERS[(number + stride * row) % len(BORDERS)]
        }
        borders = [0, *sorted(cuts), size * _segments(shards)]
        rows.append([stop - start for start, stop in pairwise(borders)])
    return replace(Rows.of(*rows), edges=tuple(edges))


def short_windows(window: int | None, shards: RowShards) -> tuple[int | None, ...]:
    """Return the windows for which short rows are asked: the scheme's own where it ends within
    them, else two that do, one shorter and one longer than a segment."""
    size = _segment(shards)
    if window is None or window <= 2 * size:
        return (window,)
    return (size // 2 + 1, size + size // 2)


def short_schemes(scheme: AttentionScheme, shards: RowShards) -> list[AttentionScheme]:
    """The scheme with each window for which short rows are asked, and the near view with its."""
    found = [scheme.with_reach(window) for window in short_windows(scheme.reach, shards)]
    if scheme.near is None:
        return found
    near = short_windows(scheme.near.window, shards)
    asked = []
    for number in range(max(len(found), len(near))):
        far, window = found[number % len(found)], near[number % len(near)]
        if far.window is not None:
            window = far.window if window is None else min(window, far.window)
        assert far.near is not None
        view = far.near.model_copy(update={"window": window})
        asked.append(far.model_copy(update={"near": view}))
    return asked


def cut_over(rows: Rows, shards: RowShards) -> Rows:
    """Return rows whose last document is lengthened until shards divide them."""
    parts = _segments(shards)
    more = -rows.length % (2 * shards.axis.size)  # as a run's rows, whatever the layout
    longer = tuple((*row[:-1], row[-1] + more) for row in rows.documents)
    length = rows.length + more
    return Rows(longer, tuple(length // parts * number for number in range(1, parts)))


def _segments(shards: RowShards) -> int:
    """Return into how many segments a row is cut."""
    return shards.axis.size * exchanges.segments_per_rank(shards.layout)


def _segment(shards: RowShards) -> int:
    """Return the tokens of a segment of a short row: a multiple of 8, as those of a run."""
    return max(8, SHORT // _segments(shards) // 8 * 8)


class _Question(NamedTuple):
    window: int | None
    rows: Rows
    ask: Callable[[], None]


@dataclass(frozen=True)
class _Crossing:
    """The questions to one scheme whose layers exchange keys with other ranks."""

    scheme: AttentionScheme
    kernel: str
    shape: HeadShape
    shards: RowShards
    contexts: Contexts

    @property
    def exchanges(self) -> tuple[exchanges.Exchange, ...]:
        """Return what its layers exchange: one thing, or one for each view of split heads."""
        return tuple(self.shards.exchange(part) for part in parts_of(self.scheme))

    @property
    def exchange(self) -> str:
        """Return the same in words."""
        return " and ".join(dict.fromkeys(self.exchanges))

    def questions(self, short: bool) -> Iterator[_Question]:
        """Each talks with other ranks first and judges then, so that the ranks stay together where
        one finds a violation and another does not."""
        for scheme in short_schemes(self.scheme, self.shards):
            yield from self._short(scheme)
        if not short:
            yield from self._at_own_length()

    def _short(self, scheme: AttentionScheme) -> Iterator[_Question]:
        """All heads, on rows whose documents end about the edges of shards."""
        rows, shape, window = short_rows(self.shards), self.shape, scheme.reach
        views, context = sides(scheme, self.kernel), self.contexts.of(rows)
        for each in (rows.first(2).joined(), rows):
            for side in views:
                yield from self._laws(side, shape, each)
            whole = partial(self._whole(scheme).numbers, scheme, shape, each)
            yield _Question(window, each, whole)
        for layer, view, kernel in views:
            bare = HeadsOnly(shape, laws.bare(layer), kernel)
            finite = partial(laws.stays_finite, bare, shape, context, rows)
            yield _Question(view.reach, rows, finite)
            match view.position:
                case Rope():
                    pass
                case Nope():
                    block = self._whole(layer, kernel).block(layer, shape, rows.length)
                    blind = partial(laws.is_blind_to_position, block, shape, self.contexts)
                    yield _Question(view.reach, rows, partial(blind, rows.length, view))
                case other:
                    assert_never(other)

    def _laws(
        self, side: tuple[AttentionScheme, AttentionScheme, str], shape: HeadShape, rows: Rows
    ) -> Iterator[_Question]:
        """The table of a view's rotation, and which keys it sees."""
        layer, view, kernel = side
        bare, window = HeadsOnly(shape, laws.bare(layer), kernel), view.reach
        yield _Question(window, rows, partial(self._whole(view, kernel).rotates, shape, rows))
        yield _Question(window, rows, partial(self._sees, bare, shape, rows, view))

    def _at_own_length(self) -> Iterator[_Question]:
        """Few heads, with the scheme's own window, which may be far beyond a short row."""
        scheme, fewest = self.scheme, self.fewest_heads()
        for side in sides(scheme, self.kernel):
            rows = cut_over(own_rows(side[1].reach, self.kernel), self.shards)
            for each in (rows.first(1).joined(), rows):
                yield from self._laws(side, fewest, each)
        scheme, rows, shape = reduced(scheme, self.kernel, fewest, SHARE)
        shape = shape if self._serves(shape) else fewest
        rows, window = cut_over(rows, self.shards), scheme.reach
        found = _asked_by(self.scheme, scheme, self.shards)
        shards = replace(self.shards, exchanges=tuple(found.items()))
        one = replace(self._whole(scheme), contexts=Contexts(shape, shards))
        for each in (rows.first(1).joined(), rows):
            yield _Question(window, each, partial(one.numbers, scheme, shape, each))

    def _whole(self, scheme: AttentionScheme, kernel: str | None = None) -> OneScheme:
        return OneScheme(scheme, kernel or self.kernel, self.shape, self.contexts, None, False)

    def _sees(self, bare: HeadsOnly, shape: HeadShape, rows: Rows, view: AttentionScheme) -> None:
        with torch.no_grad():
            laws.sees_its_keys(bare, shape, self.contexts.of(rows), rows, view)

    def fewest_heads(self) -> HeadShape:
        """Return the fewest heads that the exchange can serve: short rows ask all."""
        shape = self.shape
        while (smaller := shape.smaller()) is not None and self._serves(smaller):
            shape = smaller
        return shape

    def _serves(self, shape: HeadShape) -> bool:
        group = shape.heads // shape.kv_heads
        counts = [kv_heads for _, kv_heads in kv_heads_of_views(self.scheme, shape.kv_heads)]
        counts = counts if self.scheme.split is not None else [shape.kv_heads]
        return all(
            exchange != "heads" or heads.split_over(self.shards.axis.size)
            for exchange, count in zip(self.exchanges, counts, strict=True)
            if count
            for heads in (exchanges.HeadShape(group * count, count, shape.head_dim),)
        )

    def in_words(self, name: str, violation: Violation, question: _Question, world: Axis) -> str:
        """Return the message of a violation, which names the rank that holds the token."""
        shards, rank = replace(self.shards, length=question.rows.length), world.ranks[world.rank]
        if violation.token is not None:
            rank = holder(shards, violation.token)
        window = question.window
        word = "window" if self.scheme.chunk is None else "chunk"
        asked = "" if window == self.scheme.reach else f" (asked with {word}={window})"
        return (
            f"self-test: scheme '{name}' with exchange {self.exchange} over {shards.axis.size} "
            f"context ranks ({shards.layout}) and kernel {self._whole(self.scheme).kernel_name()} "
            f"on rank {rank}{asked} {violation}. Do not train with it: choose another "
            "parallel.exchange or kernel, or mend this one."
        )
