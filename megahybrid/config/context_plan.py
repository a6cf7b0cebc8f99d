"""Which exchange each layer of a plan gets for rows of one length, and how these rows lie.

A layer's queries meet their keys by one exchange. So does one with two views that are fused: keys
and values go once, as no view rotates them, and each rank rotates what it receives for both. Where
heads are split over two views, those of each have an exchange of their own.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, assert_never

from megahybrid.config.attention import AttentionScheme
from megahybrid.config.context import (
    Exchange,
    HeadShape,
    Layout,
    Segment,
    Traffic,
    choose_exchange,
    choose_layout,
    exchange_bytes,
    is_full,
    segments,
    segments_per_rank,
)
from megahybrid.config.fusion import HeadSplit, has_product
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig, either
from megahybrid.config.parallel import ParallelConfig
from megahybrid.errors import ConfigError


class SplitPart(NamedTuple):
    """The heads of one view of a layer whose heads are split over two."""

    window: int | None  # of the view
    split: HeadSplit
    near: bool


# Heads that meet their keys by one exchange: all of a layer with this window, or a part of them.
Part = int | None | SplitPart


def parts_of(scheme: AttentionScheme) -> tuple[Part, ...]:
    """Return the parts of a layer's heads that have an exchange each: all of them, or near and far
    where they are split."""
    if scheme.split is None:
        return (scheme.reach,)
    near, far = scheme.views()
    return (
        SplitPart(near.reach, scheme.split, True),
        SplitPart(far.reach, scheme.split, False),
    )


@dataclass(frozen=True)
class Crossing:
    """What crosses for the layers of one scheme, or for one part of their heads."""

    scheme: str
    part: Part
    windows: tuple[int | None, ...]  # of the views that meet the same keys, the widest first
    shapes: tuple[HeadShape, ...]  # that tensor ranks have: one, or several where heads are split

    @property
    def name(self) -> str:
        """The scheme's name, with the view where heads are split."""
        if not isinstance(self.part, SplitPart):
            return self.scheme
        return f"{self.scheme} ({'near' if self.part.near else 'far'})"

    @property
    def window(self) -> int | None:
        """The most keys that a query sees."""
        return self.windows[0]

    def hardest(self, degree: int) -> HeadShape:
        """Return the heads that say whether `degree` ranks can each take a part of them: those of a
        tensor rank where they cannot, if there is one. Without gates: layers of one window are to
        choose alike."""
        found = next((s for s in self.shapes if not s.split_over(degree)), self.shapes[0])
        return replace(found, gates=0)

    def choose(
        self, parallel: ParallelConfig, length: int, layout: Layout = "contiguous"
    ) -> Exchange | None:
        """Return the exchange for rows of this length, None where each rank has its own."""
        told, degree = parallel.exchange, parallel.context_degree(length)
        return choose_exchange(
            told.full if is_full(self.window, length) else told.windowed,
            self.window,
            length,
            degree,
            self.hardest(degree),
            segments=segments_per_rank(layout),
        )

    def traffic(
        self, exchange: Exchange, length: int, degree: int, layout: Layout, bytes_per_value: int
    ) -> Traffic:
        """Return the bytes of a row and layer on the tensor rank that receives the most."""
        return max(
            (
                exchange_bytes(
                    exchange,
                    self.window,
                    length,
                    degree,
                    shape,
                    segments=segments_per_rank(layout),
                    bytes_per_value=bytes_per_value,
                )
                for shape in self.shapes
            ),
            key=Traffic.total,
        )


def crossings(
    model: ModelConfig, tensor: int, name: str, scheme: AttentionScheme
) -> tuple[Crossing, ...]:
    """Return what crosses for a scheme's layers."""
    shape = HeadShape.of(model, tensor)
    if scheme.split is None:
        if scheme.fuse is not None and has_product(scheme.fuse.gate):
            shape = HeadShape(shape.heads, shape.kv_heads, shape.head_dim, gates=shape.heads)
        windows = tuple(view.reach for view in reversed(scheme.views()))
        return (Crossing(name, scheme.reach, windows, (shape,)),)
    found = []
    for part in parts_of(scheme):
        assert isinstance(part, SplitPart)
        shapes = _shapes_of_part(model, tensor, part)
        if shapes:
            found.append(Crossing(name, part, (part.window,), shapes))
    return tuple(found)


def _shapes_of_part(model: ModelConfig, tensor: int, part: SplitPart) -> tuple[HeadShape, ...]:
    """Return the heads of one view that tensor ranks have, without those that have none of it."""
    shape = HeadShape.of(model, tensor)
    group = shape.heads // shape.kv_heads
    counts = {
        sum(part.split.is_near(head) == part.near for head in heads)
        for heads in _kv_heads_of_ranks(model, tensor)
    }
    return tuple(HeadShape(group * n, n, shape.head_dim) for n in sorted(counts - {0}))


def _kv_heads_of_ranks(model: ModelConfig, tensor: int) -> list[range]:
    """Return the key heads of each tensor rank, among those of the model; one that it shares with
    others where there are more ranks."""
    heads = model.num_kv_heads
    local = max(1, heads // tensor)
    starts = [rank * heads // tensor for rank in range(tensor)]
    return [range(start, start + local) for start in starts]


@dataclass(frozen=True)
class ContextPlan:
    """The layout and the exchanges of rows of one length: a value, the same on every rank."""

    length: int
    degree: int
    layout: Layout
    crossings: tuple[tuple[Crossing, Exchange | None], ...]

    @property
    def exchanges(self) -> tuple[tuple[str, Exchange | None], ...]:
        """Each scheme's exchange by its name; of split heads one for each view."""
        return tuple((crossing.name, exchange) for crossing, exchange in self.crossings)

    def exchange(self, name: str) -> Exchange | None:
        """The exchange of a scheme's layers; None at degree 1, where nothing crosses."""
        return dict(self.exchanges)[name]

    def of(self, scheme: str) -> list[tuple[Crossing, Exchange | None]]:
        """Return what crosses for the layers of a scheme: one thing, or one for each view."""
        return [each for each in self.crossings if each[0].scheme == scheme]

    def layer_bytes(
        self, scheme: str, bytes_per_value: int = 2, *, forward_again: bool = False
    ) -> int:
        """Return what a rank receives for a row and layer of a scheme."""
        return sum(
            self.crossing_bytes(*each, bytes_per_value, forward_again=forward_again)
            for each in self.of(scheme)
        )

    def crossing_bytes(
        self,
        crossing: Crossing,
        exchange: Exchange | None,
        bytes_per_value: int = 2,
        *,
        forward_again: bool = False,
    ) -> int:
        """Return what a rank receives for a row and layer by one exchange."""
        if exchange is None:
            return 0
        found = crossing.traffic(exchange, self.length, self.degree, self.layout, bytes_per_value)
        return found.total(forward_again=forward_again)

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of a row that one rank holds."""
        return self.length // self.degree

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """Return the segments of a row on context rank `rank`, in the row's order."""
        return segments(self.layout, self.length, self.degree, rank)

    def record(self) -> dict[str, Any]:
        """The plan for a checkpoint's record of kernels: plain values, ready for JSON."""
        return {
            "length": self.length,
            "degree": self.degree,
            "layout": self.layout,
            "exchanges": dict(self.exchanges),
        }

    def in_words(self) -> str:
        """ "65,536 tokens over 8 context ranks (contiguous): local halo, global heads"."""
        chosen = ", ".join(f"{name} {exchange}" for name, exchange in self.exchanges)
        ranks = "1 context rank" if self.degree == 1 else f"{self.degree} context ranks"
        head = f"{self.length:,} tokens over {ranks}"
        return head if self.degree == 1 else f"{head} ({self.layout}): {chosen}"


def plan_context(
    model: ModelConfig, parallel: ParallelConfig, plan: LayerPlan, length: int
) -> ContextPlan:
    """Return how rows of `length` tokens cross the context ranks under layer plan `plan`.

    The full layers choose first: the layout follows from them, and the halo from the layout.
    Raises ConfigError, one line per mistake, where an exchange set by hand cannot serve.
    """
    lines = exchange_problems(model, parallel, plan, length)
    if lines:
        raise ConfigError(*lines)
    every = crossings_of_plan(model, parallel.tensor, plan)
    full = [each for each in every if is_full(each.window, length)]
    layout = choose_layout(
        parallel.exchange.layout, [each.choose(parallel, length) for each in full]
    )
    degree = parallel.context_degree(length)
    return ContextPlan(
        length=length,
        degree=degree,
        layout=layout if degree > 1 else "contiguous",
        crossings=tuple((each, each.choose(parallel, length, layout)) for each in every),
    )


def crossings_of_plan(model: ModelConfig, tensor: int, plan: LayerPlan) -> list[Crossing]:
    """Return what crosses for each scheme of a plan."""
    return [
        each
        for name, scheme in plan.schemes.items()
        for each in crossings(model, tensor, name, scheme)
    ]


def fewer_queries(
    model: ModelConfig, parallel: ParallelConfig, plan: LayerPlan, length: int
) -> set[str]:
    """Return the kinds of layers, full or windowed, whose attention kernel meets fewer queries than
    keys in rows of `length` tokens: a part of the row, after a halo or all earlier keys."""
    found: set[str] = set()
    for crossing, exchange in plan_context(model, parallel, plan, length).crossings:
        match exchange:
            case "halo" | "keys":
                found |= {"full" if each is None else "windowed" for each in crossing.windows}
            case "heads" | None:
                pass
            case never:
                assert_never(never)
    return found


def exchange_problems(
    model: ModelConfig, parallel: ParallelConfig, plan: LayerPlan, length: int
) -> list[str]:
    """Return a line for each exchange set by hand that cannot serve rows of `length` tokens."""
    degree, lines = parallel.context_degree(length), dict[str, str]()
    if degree == 1:
        return []
    for crossing in crossings_of_plan(model, parallel.tensor, plan):
        full, shape = is_full(crossing.window, length), crossing.hardest(degree)
        field = "full" if full else "windowed"
        told = parallel.exchange.full if full else parallel.exchange.windowed
        if told != "heads" or shape.split_over(degree):
            continue
        of = f" of scheme {crossing.name}" if isinstance(crossing.part, SplitPart) else ""
        lines[field] = (
            f"parallel.exchange.{field}=heads cannot split a tensor rank's {shape.heads} heads{of} "
            f"(KV heads: {shape.kv_heads}) over {degree} context ranks (parallel.context at length "
            f"{length}). Use {either(shape.legal_degrees())} context ranks, or "
            f"{'keys' if full else 'halo'}."
        )
    return [lines[field] for field in ("full", "windowed") if field in lines]
