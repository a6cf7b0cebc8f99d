"""What moves between ranks for one row of a run: ours against what others move, by formula.

Bytes that one rank receives for a row, forward and backward, bf16. The tensor axis gathers and
scatters the residual stream: ten times a layer, five where both branches share one norm, four or
two more under full recomputation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megahybrid.config.context import (
    Exchange,
    HeadShape,
    Layout,
    Segment,
    Traffic,
    exchange_bytes,
    segments,
    segments_per_rank,
)
from megahybrid.config.context_plan import plan_context
from megahybrid.config.counting import branches_together
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig
from megahybrid.config.parallel import ParallelConfig, is_legal_tensor_degree

_WIDTH = 2  # bytes of a bf16 value
_RING_WIDTH = 2 + 2 + 4  # keys and values forward and again in backward, gradients in fp32


@dataclass(frozen=True)
class PeriodVolume:
    """Bytes that one rank receives for one row and one period of layers; None where not legal."""

    degree: int
    schemes: tuple[str, ...]  # of the period's layers
    ours: int
    tensor: int  # of the tensor axis, beside it
    heads: int | None  # on every layer (Ulysses)
    keys: int  # gathered on every layer
    ring: int  # on every layer
    tensor_alone: int | None  # by tensor * degree tensor ranks, without context ranks


def period(plan: LayerPlan) -> tuple[str, ...]:
    """Return the schemes of the layers that repeat."""
    if isinstance(plan.pattern, list):
        return tuple(plan.pattern)
    names = [plan.pattern.default] * plan.pattern.period
    names[plan.pattern.offset] = plan.pattern.special
    return tuple(names)


def period_volume(
    model: ModelConfig, parallel: ParallelConfig, plan: LayerPlan, length: int
) -> PeriodVolume:
    """Return what moves for a row of `length` tokens in one period of layers of `plan`."""
    crossing = plan_context(model, parallel, plan, length)
    degree, names = crossing.degree, period(plan)
    shape = HeadShape.of(model, parallel.tensor)

    def everywhere(exchange: Exchange) -> int:
        count = segments_per_rank(crossing.layout)
        one = exchange_bytes(exchange, None, length, degree, shape, segments=count).total()
        return len(names) * one if degree > 1 else 0

    others = 2 * (length - length // degree) * shape.kv_heads * shape.head_dim
    alone = parallel.tensor * degree
    return PeriodVolume(
        degree=degree,
        schemes=names,
        ours=sum(map(crossing.layer_bytes, names)),
        tensor=len(names) * tensor_bytes(model, parallel.tensor, length // degree),
        heads=everywhere("heads") if shape.split_over(degree) else None,
        keys=everywhere("keys"),
        ring=len(names) * others * _RING_WIDTH,
        tensor_alone=len(names) * tensor_bytes(model, alone, length)
        if is_legal_tensor_degree(model, alone)
        else None,
    )


def tensor_bytes(
    model: ModelConfig, tensor: int, tokens: int, *, forward_again: bool = False
) -> int:
    """Return the bytes that one rank of `tensor` receives for a layer on `tokens` tokens of a row;
    `forward_again` under full recomputation."""
    branches = 1 if branches_together(model.block) else 2
    passes = branches * (7 if forward_again else 5)
    return passes * tokens * model.hidden_size * _WIDTH * (tensor - 1) // tensor


def received_bytes(
    exchange: Exchange,
    window: int | None,
    length: int,
    degree: int,
    shape: HeadShape,
    *,
    layout: Layout,
    rank: int,
    bytes_per_value: int = 2,
) -> Traffic:
    """Return what rank `rank` of a row receives for one layer, to the byte.

    `exchange_bytes` is the same but for a halo, whose size it gives for a rank that lacks all keys
    before each of its segments: the first rank of a row has none before it, the two middle segments
    of a zigzag lie on one rank, and short rows have fewer keys than a window.
    """
    if exchange != "halo":
        count = segments_per_rank(layout)
        return exchange_bytes(
            exchange,
            window,
            length,
            degree,
            shape,
            segments=count,
            bytes_per_value=bytes_per_value,
        )
    assert window is not None
    held = [segments(layout, length, degree, other) for other in range(degree)]
    others = [other for other in range(degree) if other != rank]
    each = 2 * shape.kv_heads * shape.head_dim * bytes_per_value
    # Gradients come back from every rank that this one's keys were sent to.
    return Traffic(
        forward=each * sum(_lent(held[other], held[rank], window - 1) for other in others),
        backward=each * sum(_lent(held[rank], held[other], window - 1) for other in others),
    )


def _lent(owner: Sequence[Segment], borrower: Sequence[Segment], reach: int) -> int:
    """Return how many of the `reach` tokens before each segment of a rank another one holds."""
    return sum(
        max(0, min(start, last) - max(0, start - reach, first))
        for start, _ in borrower
        for first, last in owner
    )
