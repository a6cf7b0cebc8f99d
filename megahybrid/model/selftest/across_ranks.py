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
from megahybrid.errors import AuditError
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
    exchange = {
        window: shards.exchange(scheme.reach)
        for scheme in schemes.values()
        for window in (*short_windows(scheme.reach, shards), scheme.reach)
    }
    return Contexts(shape, replace(shards, exchanges=tuple(exchange.items())))


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
    def exchange(self) -> exchanges.Exchange:
        """Return what its layers exchange."""
        return self.shards.exchange(self.scheme.reach)

    def questions(self, short: bool) -> Iterator[_Question]:
        """Each talks with other ranks first and judges then, so that the ranks stay together where
        one finds a violation and another does not."""
        for window in short_windows(self.scheme.reach, self.shards):
            yield from self._short(self.scheme.with_reach(window))
        if not short:
            yield from self._at_own_length()

    def _short(self, scheme: AttentionScheme) -> Iterator[_Question]:
        """All heads, on rows whose documents end about the edges of shards."""
        rows, shape, window = short_rows(self.shards), self.shape, scheme.reach
        bare, one = HeadsOnly(shape, laws.bare(scheme), self.kernel), self._whole(scheme)
        for each in (rows.first(2).joined(), rows):
            yield _Question(window, each, partial(one.rotates, shape, each))
            yield _Question(window, each, partial(self._sees, bare, shape, each))
            yield _Question(window, each, partial(one.numbers, scheme, shape, each))
        context = self.contexts.of(rows)
        yield _Question(window, rows, partial(laws.stays_finite, bare, shape, context, rows))
        match scheme.position:
            case Rope():
                pass
            case Nope():
                block = one.block(scheme, shape, rows.length)
                blind = partial(laws.is_blind_to_position, block, shape, self.contexts)
                yield _Question(window, rows, partial(blind, rows.length))
            case other:
                assert_never(other)

    def _at_own_length(self) -> Iterator[_Question]:
        """Few heads, with the scheme's own window, which may be far beyond a short row."""
        scheme, shape, window = self.scheme, self.fewest_heads(), self.scheme.reach
        rows = cut_over(own_rows(window, self.kernel), self.shards)
        bare = HeadsOnly(shape, laws.bare(scheme), self.kernel)
        for each in (rows.first(1).joined(), rows):
            yield _Question(window, each, partial(self._whole(scheme).rotates, shape, each))
            yield _Question(window, each, partial(self._sees, bare, shape, each))
        scheme, rows, shape = reduced(scheme, self.kernel, shape, SHARE)
        rows, window = cut_over(rows, self.shards), scheme.reach
        shards = replace(self.shards, exchanges=((window, self.exchange),))
        one = replace(self._whole(scheme), contexts=Contexts(shape, shards))
        for each in (rows.first(1).joined(), rows):
            yield _Question(window, each, partial(one.numbers, scheme, shape, each))

    def _whole(self, scheme: AttentionScheme) -> OneScheme:
        return OneScheme(scheme, self.kernel, self.shape, self.contexts, None, False)

    def _sees(self, bare: HeadsOnly, shape: HeadShape, rows: Rows) -> None:
        with torch.no_grad():
            laws.sees_its_keys(bare, shape, self.contexts.of(rows), rows)

    def fewest_heads(self) -> HeadShape:
        """Return the fewest heads that the exchange can serve: short rows ask all."""
        shape = self.shape
        while (smaller := shape.smaller()) is not None and self._serves(smaller):
            shape = smaller
        return shape

    def _serves(self, shape: HeadShape) -> bool:
        heads = exchanges.HeadShape(shape.heads, shape.kv_heads, shape.head_dim)
        return self.exchange != "heads" or heads.split_over(self.shards.axis.size)

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
