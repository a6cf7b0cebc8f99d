"""What context ranks change in the memory of one rank: an estimate from formulas, in bytes.

Each of C context ranks works on micro_batch_tokens / C tokens, whatever the length. The exchange of
a layer adds to what is kept for backward where attention is not computed again, and to what stands
while it runs (per row of N tokens over c ranks, in values, S segments on a rank):

- halo: the keys and values before each segment, 2 S (W - 1) g D, and as much for their gradients.
- heads: keys and values of the whole row for max(1, g / c) heads in place of a rank's own; queries
  and mixed values once more while they travel.
- keys: keys and values of the whole row for one KV head at a time, 2 N D, and their gradients.

Of two views that are fused each rotates keys that came unrotated: once more as many keys a view.
"""

from dataclasses import dataclass
from typing import assert_never

from megahybrid.config.context import Exchange, segments_per_rank
from megahybrid.config.context_plan import ContextPlan, Crossing, plan_context
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig
from megahybrid.config.parallel import ParallelConfig
from megahybrid.config.run import RunConfig
from megahybrid.config.stages import Stage


@dataclass(frozen=True)
class ContextMemory:
    """The bytes that the context axis adds to the memory of a rank, and what it divides."""

    axis: int = 1  # ranks over which tokens and ZeRO's states are cut as well
    kept: tuple[int, ...] = ()  # bytes of each layer for backward; none without context ranks
    working: int = 0  # bytes beside one layer's backward


ALONE = ContextMemory()


def context_memory(run: RunConfig, index: int) -> ContextMemory:
    """The memory of stage `index` of a run.

    Raises ConfigError where an exchange set by hand cannot serve.
    """
    return stage_context_memory(
        run.model, run.parallel, run.stages[index], run.plan_at(index), run.precision
    )


def stage_context_memory(
    model: ModelConfig, parallel: ParallelConfig, stage: Stage, plan: LayerPlan, precision: str
) -> ContextMemory:
    """The same from a run's parts: for each layer that of the length which needs most."""
    axis = parallel.context_axis
    if axis == 1:
        return ALONE
    width = 4 if precision == "fp32" else 2
    kept, working = dict.fromkeys(plan.schemes, 0), 0
    for length in stage.lengths:
        crossing = plan_context(model, parallel, plan, length)
        rows = stage.micro_batch_tokens * crossing.degree // (axis * length)
        for name in plan.schemes:
            values = [_values(crossing, *each) for each in crossing.of(name)]
            stays, stands = (sum(each) for each in zip(*values, strict=True))
            kept[name] = max(kept[name], rows * stays * width)
            working = max(working, rows * stands * width)
    return ContextMemory(axis, tuple(kept[name] for name in plan.names()), working)


def _values(plan: ContextPlan, crossing: Crossing, exchange: Exchange | None) -> tuple[int, int]:
    """Return the values of one row that a layer keeps for backward, and that stand beside.

    Two views that are fused each have keys of their own of what came.
    """
    length, own, views = plan.length, plan.tokens_per_rank, len(crossing.windows)
    shape = max(crossing.shapes, key=lambda one: one.heads)
    heads, kv_heads, head_dim = shape.heads, shape.kv_heads, shape.head_dim
    turned = views if views > 1 else 0
    match exchange:
        case None:
            return 0, 0
        case "halo":
            assert crossing.window is not None
            # A rank of a short row has no more than the row before a segment.
            before = min(crossing.window - 1, length) * segments_per_rank(plan.layout)
            halo = 2 * before * kv_heads * head_dim
            return halo + turned * halo // 2, halo
        case "heads":
            whole = (2 + turned) * length * max(1, kv_heads // plan.degree) * head_dim
            mine = 2 * own * kv_heads * head_dim
            return whole - mine, whole + 2 * own * heads * head_dim
        case "keys":
            return 0, (4 + turned) * length * head_dim
        case never:
            assert_never(never)
