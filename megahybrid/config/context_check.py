"""The checks of context ranks against the stages: lengths, micro batches, exchanges, kernels."""

from collections.abc import Iterator

from megahybrid.config.context import (
    Exchange,
    HeadShape,
    Layout,
    segments_per_rank,
)
from megahybrid.config.context_plan import ContextPlan, exchange_problems, plan_context
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import either, nearest_multiples
from megahybrid.config.run import RunConfig
from megahybrid.errors import ConfigError

# Kernels that serve queries which are the last tokens of a longer stretch of keys, as halo and keys
# give them to a rank. heads gives whole rows, which every kernel serves.
FEWER_QUERIES = {
    "full": ("auto", "reference", "sdpa", "varlen", "flex", "fa3", "fa4"),
    "windowed": ("auto", "reference", "blocked", "varlen", "flex", "fa3", "fa4"),
}


def context_problems(run: RunConfig, index: int) -> Iterator[str]:
    """Yield what context ranks cannot do in stage `index`, one line each; nothing without them."""
    model, parallel, stage = run.model, run.parallel, run.stages[index]
    if parallel.context_axis == 1 or model.num_heads % parallel.tensor:
        return
    try:  # of those that an anneal makes, only windows matter here
        plans = {_windows(part.plan): part.plan for part in run.plans[index]}
    except ConfigError:  # a stage changes a scheme that cannot be changed so, and has its line
        return
    shape, refused = HeadShape.of(model, parallel.tensor), set[str]()
    for length in stage.lengths:
        yield from _micro_batch(run, index, length)
        if parallel.context_degree(length) == 1:
            continue
        for plan in plans.values():
            if lines := exchange_problems(model, parallel, plan, length):
                yield from lines
                continue
            crossing = plan_context(model, parallel, plan, length)
            yield from _length(run, index, crossing)
            yield from _kernels(run, crossing, shape, refused)


def _windows(plan: LayerPlan) -> tuple[tuple[str, int | None], ...]:
    return tuple(
        (name, view.reach) for name, scheme in plan.schemes.items() for view in scheme.views()
    )


def row_multiple(layout: Layout, degree: int, tensor: int) -> int:
    """The number of tokens of which a row is a multiple: each segment is cut over tensor ranks."""
    return segments_per_rank(layout) * degree * tensor


def _length(run: RunConfig, index: int, crossing: ContextPlan) -> Iterator[str]:
    length, degree, tensor = crossing.length, crossing.degree, run.parallel.tensor
    where = f"stages.{index}.lengths names {length}"
    if degree > length:
        yield (
            f"{where}, fewer tokens than its {degree} context ranks (parallel.context). "
            f"Use {length} context ranks or fewer."
        )
        return
    unit = row_multiple(crossing.layout, degree, tensor)
    if length % unit == 0:
        return
    ranks = f"{degree} context ranks"
    if crossing.layout == "zigzag":
        ranks = f"2 zigzag segments on each of {ranks}"
    factors = [ranks] + [f"parallel.tensor={tensor}"] * (tensor > 1)
    contiguous = row_multiple("contiguous", degree, tensor)
    way_out = ""
    if crossing.layout == "zigzag" and length % contiguous == 0:
        way_out = " Or set parallel.exchange.layout: contiguous."
    yield (
        f"{where}, which is not a multiple of {unit} ({' times '.join(factors)}). "
        f"{nearest_multiples(length, unit)}{way_out}"
    )


def _micro_batch(run: RunConfig, index: int, length: int) -> Iterator[str]:
    degree, axis = run.parallel.context_degree(length), run.parallel.context_axis
    groups = axis // degree
    tokens = run.stages[index].micro_batch_tokens
    # At the full degree it is the check of every run, that a micro batch holds whole rows.
    if groups > 1 and tokens % (groups * length):
        yield (
            f"stages.{index}.micro_batch_tokens={tokens} is not a multiple of {groups * length}: "
            f"at length {length} each of {groups} groups of {degree} among {axis} context ranks "
            f"(parallel.context) takes whole rows. {nearest_multiples(tokens, groups * length)}"
        )


def _kernels(
    run: RunConfig,
    plan: ContextPlan,
    shape: HeadShape,
    refused: set[str],
) -> Iterator[str]:
    """A line for each field that is not in `refused`: one length of a stage tells it for all."""
    kernels = {"full": run.kernels.full, "windowed": run.kernels.windowed}
    for field, exchange in _met(plan):
        serves = exchange == "heads" or kernels[field] in FEWER_QUERIES[field]
        if serves or field in refused:
            continue
        refused.add(field)
        heads = ""
        if shape.split_over(plan.degree):
            heads = f", or parallel.exchange.{field}: heads"
        yield (
            f"kernels.{field}={kernels[field]} does not serve fewer queries than keys, as "
            f"{plan.degree} context ranks have them (exchange {exchange} at length "
            f"{plan.length}). Use {either(FEWER_QUERIES[field])}{heads}."
        )


def _met(plan: ContextPlan) -> Iterator[tuple[str, Exchange | None]]:
    """Yield (full or windowed, exchange) of each view of each scheme."""
    for crossing, exchange in plan.crossings:
        for window in crossing.windows:
            yield "full" if window is None else "windowed", exchange
