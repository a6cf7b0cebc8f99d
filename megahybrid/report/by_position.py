"""Loss by position: what a longer context is worth, and where a model stops to use it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from megahybrid.report.record import Evaluation, RunRecord
from megahybrid.report.style import MARKERS, new_figure, ordered_colours

LEAST_TOKENS = 256  # a mean of fewer is off by more than the differences that the plot is about


def loss_by_position(record: RunRecord) -> Figure | None:
    """One panel per held-out set, one curve per stage."""
    sets = [name for name in record.held_out_sets() if record.at_stage_ends(name)]
    if not sets:
        return None
    figure, panels = new_figure(columns=min(3, len(sets)), height=4.6)
    for axes, held_out in zip(panels, sets, strict=False):
        draw_by_position(axes, record, held_out)
        axes.set_title(f"Loss by position · {held_out}", pad=12)
    return figure


def draw_by_position(axes: Axes, record: RunRecord, held_out: str) -> None:
    """Curves of one set into given axes.

    A bucket [start, stop) of positions is drawn at the tokens of context its targets see, start + 1
    to stop, on a log scale. A bucket that no curve has data for is hatched.
    """
    evaluations = record.at_stage_ends(held_out)
    order = [stage.name for stage in record.stages]
    colours = dict(zip(order, ordered_colours(len(order)), strict=True))
    for one in evaluations:
        index = order.index(one.stage) if one.stage in order else 0
        centres, losses = _curve(one)
        axes.plot(centres, losses, color=colours.get(one.stage, "#000000"), label=one.stage,
                  marker=MARKERS[index % len(MARKERS)], markersize=5.5,
                  markeredgecolor="white", markeredgewidth=0.6, zorder=3)  # fmt: skip
    _hatch_empty(axes, evaluations)
    axes.set_xscale("log", base=2)
    last = max(bucket["stop"] for one in evaluations for bucket in one.by_position)
    axes.set_xlim(1, last)
    powers = range(0, int(np.log2(last)) + 1, 2)
    axes.xaxis.set_major_locator(FixedLocator([2.0**power for power in powers]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _context(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    for stage in record.stages:
        # Where each stage's training ended, on the axis itself: the curves beyond it extrapolate.
        if 1 < stage.longest < last and stage.name in {one.stage for one in evaluations}:
            axes.axvline(stage.longest, ymax=0.06, color=colours[stage.name], linewidth=3, zorder=2)
    axes.plot([], [], "|", color="#555555", markersize=12, markeredgewidth=3,
              label="length trained to")  # fmt: skip
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("held-out loss (nats per token)")
    legend = axes.legend(title="after stage", loc="best", alignment="left")
    legend.get_title().set_fontweight("bold")


def _curve(one: Evaluation) -> tuple[list[float], list[float]]:
    """Geometric middle of each bucket's contexts, and its loss; nan breaks the line."""
    buckets = joined_buckets(one.by_position)
    centres = [((b["start"] + 1) * b["stop"]) ** 0.5 for b in buckets]
    losses = [float("nan") if b["loss"] is None else b["loss"] for b in buckets]
    return centres, losses


def joined_buckets(
    buckets: Sequence[dict[str, Any]], least_tokens: int = LEAST_TOKENS
) -> list[dict[str, Any]]:
    """Neighbouring buckets joined until each has `least_tokens` targets; empty ones stay empty.

    The mean of a handful of targets says nothing, and the first buckets of a few documents hold no
    more than that. What is left over before an empty bucket joins the one before it.
    """
    joined: list[dict[str, Any]] = []
    for bucket in buckets:
        last = joined[-1] if joined else None
        if last and last["loss"] is not None and bucket["loss"] is not None:
            if last["tokens"] < least_tokens:
                joined[-1] = _together(last, bucket)
                continue
        elif last and bucket["loss"] is None:
            _join_left_over(joined, least_tokens)
        joined.append(bucket)
    _join_left_over(joined, least_tokens)
    return joined


def _join_left_over(joined: list[dict[str, Any]], least_tokens: int) -> None:
    if len(joined) < 2 or joined[-1]["loss"] is None or joined[-2]["loss"] is None:
        return
    if joined[-1]["tokens"] < least_tokens:
        left_over = joined.pop()
        joined[-1] = _together(joined[-1], left_over)


def _together(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    tokens = first["tokens"] + second["tokens"]
    total = first["loss"] * first["tokens"] + second["loss"] * second["tokens"]
    return {
        "start": first["start"],
        "stop": second["stop"],
        "tokens": tokens,
        "loss": total / tokens,
    }


def _hatch_empty(axes: Axes, evaluations: list[Evaluation]) -> None:
    filled: set[tuple[int, int]] = set()
    empty: set[tuple[int, int]] = set()
    for one in evaluations:
        for bucket in one.by_position:
            span = (bucket["start"], bucket["stop"])
            (empty if bucket["loss"] is None else filled).add(span)
    for number, (start, stop) in enumerate(sorted(empty - filled)):
        axes.axvspan(start + 1, stop, facecolor="#f4f4f4", edgecolor="#bbbbbb", hatch="///",
                     linewidth=0, zorder=1, label="no data" if number == 0 else "_")  # fmt: skip


def _context(value: float) -> str:
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"
