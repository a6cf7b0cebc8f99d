"""What context ranks hold of a row and what they send one another for attention: pure arithmetic.

With a context degree of c, each rank holds N / c tokens of a row of N. The layers work on those
alone, except for attention, whose queries see keys of other ranks. Three exchanges give them:

- halo: the window - 1 keys and values before each segment come from the ranks that hold them, and
  their gradients go back.
- heads: an all-to-all gives each rank the whole row for a part of the heads, and takes it back.
- keys: keys and values are gathered, again in backward; their gradients are scattered.

Heads and KV heads are those of one tensor rank. Bytes are those that one rank receives.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, assert_never

from megahybrid.config.model import ModelConfig, divisors

Exchange = Literal["halo", "heads", "keys"]
Layout = Literal["contiguous", "zigzag"]
Segment = tuple[int, int]  # its first token in the row, and the one after its last


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank receives for one layer's attention."""

    forward: int
    backward: int

    def total(self, *, forward_again: bool = False) -> int:
        """Forward and backward together; `forward_again` where recomputation (full, offload) runs
        attention a second time."""
        return self.forward * (2 if forward_again else 1) + self.backward


@dataclass(frozen=True)
class HeadShape:
    """The attention heads of one tensor rank."""

    heads: int
    kv_heads: int
    head_dim: int
    # Values for each token beside the heads that go where its queries go: of a fused layer's gate.
    gates: int = 0

    @classmethod
    def of(cls, model: ModelConfig, tensor: int) -> "HeadShape":
        """The share of one of `tensor` ranks; at least one KV head, which ranks then share."""
        return cls(
            heads=model.num_heads // tensor,
            kv_heads=max(1, model.num_kv_heads // tensor),
            head_dim=model.head_dim,
        )

    def split_over(self, degree: int) -> bool:
        """Return whether `degree` ranks can each take a part of the heads with the KV heads that
        these read."""
        g = self.kv_heads
        return self.heads % degree == 0 and (g % degree == 0 or degree % g == 0)

    def legal_degrees(self) -> list[int]:
        """The context degrees over which the heads can be split."""
        return [degree for degree in divisors(self.heads) if self.split_over(degree)]


def is_full(window: int | None, length: int) -> bool:
    """Return whether a query of a row sees all keys before it: a window of the row's length is
    none."""
    return window is None or window >= length


def legal_exchanges(
    window: int | None, length: int, degree: int, shape: HeadShape
) -> tuple[Exchange, ...]:
    """Return the exchanges that can serve a layer, none at degree 1, where nothing crosses."""
    if degree == 1:
        return ()
    heads: tuple[Exchange, ...] = ("heads",) if shape.split_over(degree) else ()
    halo: tuple[Exchange, ...] = () if is_full(window, length) else ("halo",)
    return (*halo, *heads, "keys")


def exchange_bytes(
    exchange: Exchange,
    window: int | None,
    length: int,
    degree: int,
    shape: HeadShape,
    *,
    segments: int,
    bytes_per_value: int = 2,
) -> Traffic:
    """Return the bytes that a rank receives for one row of one layer.

    `segments` is how many a rank holds: 1 contiguous, 2 zigzag. A halo is that of a rank with
    window - 1 tokens of other ranks before each segment: the first rank of a row receives less.
    """
    values = shape.head_dim * bytes_per_value
    whole = length * (degree - 1) // degree  # tokens of a row that other ranks hold
    match exchange:
        case "halo":
            assert window is not None
            one_way = 2 * (window - 1) * shape.kv_heads * values * segments
            return Traffic(one_way, one_way)
        case "heads":
            if not shape.split_over(degree):
                raise ValueError(f"{shape} does not split over {degree} context ranks")
            # Queries out and mixed values back; keys and values, a head at least.
            heads = 2 * (shape.heads // degree) + 2 * max(1, shape.kv_heads // degree)
            gates = shape.gates // degree * bytes_per_value
            return Traffic(*(whole * (values * heads + gates),) * 2)
        case "keys":
            one_way = 2 * whole * shape.kv_heads * values
            return Traffic(one_way, 2 * one_way)  # gathered again, and the gradients
        case never:
            assert_never(never)


def choose_exchange(
    choice: Literal["auto"] | Exchange,
    window: int | None,
    length: int,
    degree: int,
    shape: HeadShape,
    *,
    segments: int,
) -> Exchange | None:
    """Return the exchange of a layer: `choice`, or the legal one of the fewest bytes (equal ones in
    the order halo, heads, keys); None at degree 1.

    Raises ValueError where `choice` is not legal.
    """
    legal = legal_exchanges(window, length, degree, shape)
    if not legal:
        return None
    if choice == "auto":
        return min(
            legal,
            key=lambda exchange: exchange_bytes(
                exchange, window, length, degree, shape, segments=segments
            ).total(),
        )
    if choice not in legal:
        raise ValueError(f"{choice} is not among {legal}")
    return choice


def choose_layout(
    choice: Literal["auto"] | Layout, full_exchanges: Iterable[Exchange | None]
) -> Layout:
    """Return how rows lie on the ranks: `choice`, or zigzag exactly where a full layer exchanges
    keys. Contiguous ranks would wait there for the last, whose queries see the most keys."""
    if choice != "auto":
        return choice
    return "zigzag" if "keys" in full_exchanges else "contiguous"


def segments(layout: Layout, length: int, degree: int, rank: int) -> tuple[Segment, ...]:
    """Return what `rank` of `degree` holds of a row of `length` tokens, in the row's order.

    Zigzag cuts a row into 2 * degree equal segments and gives rank r those numbered r and
    2 * degree - 1 - r. `length` is a multiple of degree, or of 2 * degree.
    """
    match layout:
        case "contiguous":
            return (_part(length, degree, rank),)
        case "zigzag":
            parts = 2 * degree
            return _part(length, parts, rank), _part(length, parts, parts - 1 - rank)
        case never:
            assert_never(never)


def _part(length: int, parts: int, number: int) -> Segment:
    size = length // parts
    return number * size, (number + 1) * size


def segments_per_rank(layout: Layout) -> int:
    """Return the number of segments of a row that a rank holds."""
    match layout:
        case "contiguous":
            return 1
        case "zigzag":
            return 2
        case never:
            assert_never(never)


def work_max_over_mean(
    layout: Layout,
    exchange: Exchange,
    window: int | None,
    length: int,
    degree: int,
    *,
    near: tuple[int | None, ...] = (),
) -> float:
    """Return the scores that the busiest rank computes over the mean, in rows of one document;
    `near` has the windows of further views of the same keys.

    Exactly 1 for heads, where each rank has the whole row.
    """
    if exchange == "heads" or degree == 1:
        return 1.0
    work = [
        sum(
            _scores_before(stop, each) - _scores_before(start, each)
            for start, stop in held
            for each in (window, *near)
        )
        for held in (segments(layout, length, degree, rank) for rank in range(degree))
    ]
    return max(work) * degree / sum(work)


def _scores_before(token: int, window: int | None) -> int:
    """Return the visible keys of all queries before `token`, summed."""
    growing = token if window is None else min(token, window)
    return growing * (growing + 1) // 2 + (token - growing) * (window or 0)
