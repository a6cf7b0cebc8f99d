"""Loss by position: what a longer context is worth, and where a model stops to use it."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from megahybrid.ledger import LEAST_DOCUMENTS, PositionBucket
from megahybrid.report.parts import short_tokens
from megahybrid.report.record import Evaluation, RunRecord
from megahybrid.report.statistics import curve_buckets
from megahybrid.report.style import MARKERS, new_figure, ordered_colours


def loss_by_position(record: RunRecord) -> Figure | None:
    """Draw a panel for each held-out set, with a curve for each stage."""
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
    hollow = False
    for one in evaluations:
        index = order.index(one.stage) if one.stage in order else 0
        ink, marker = colours.get(one.stage, "#000000"), MARKERS[index % len(MARKERS)]
        same, beyond = curve_buckets(one)
        sure = [bucket for bucket in same if not _is_few(bucket)]
        few = [bucket for bucket in same if _is_few(bucket)] + beyond
        axes.plot(*_curve(sure), color=ink, label=one.stage, marker=marker, markersize=5.5,
                  markeredgecolor="white", markeredgewidth=0.6, zorder=3)  # fmt: skip
        _intervals(axes, sure, ink)
        axes.plot(*_curve(few), linestyle="none", marker=marker, markersize=5.5,
                  markerfacecolor="none", markeredgecolor=ink, alpha=0.7, zorder=3)  # fmt: skip
        hollow = hollow or bool(few)
    _hatch_empty(axes, evaluations)
    axes.set_xscale("log", base=2)
    last = max(bucket.stop for one in evaluations for bucket in one.by_position)
    axes.set_xlim(1, last)
    powers = range(0, int(np.log2(last)) + 1, 2)
    axes.xaxis.set_major_locator(FixedLocator([2.0**power for power in powers]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_tokens(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    for stage in record.stages:
        # Where each stage's training ended, on the axis itself: the curves beyond it extrapolate.
        if 1 < stage.longest < last and stage.name in {one.stage for one in evaluations}:
            axes.axvline(stage.longest, ymax=0.06, color=colours[stage.name], linewidth=3, zorder=2)
    axes.plot([], [], "|", color="#555555", markersize=12, markeredgewidth=3,
              label="length trained to")  # fmt: skip
    if hollow:
        axes.plot([], [], "o", markerfacecolor="none", markeredgecolor="#555555",
                  label=f"under {LEAST_DOCUMENTS} documents")  # fmt: skip
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("held-out loss (nats per token)")
    # Room above the curves, because no corner is free of them in every run.
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.4 * (high - low))
    legend = axes.legend(title="after stage", loc="upper left", ncols=2, alignment="left")
    legend.get_title().set_fontweight("bold")


def _curve(buckets: list[PositionBucket]) -> tuple[list[float], list[float]]:
    """Geometric middle of each bucket's contexts, and its loss; nan breaks the line."""
    centres = [((b.start + 1) * b.stop) ** 0.5 for b in buckets]
    losses = [float("nan") if b.loss is None else b.loss for b in buckets]
    return centres, losses


def _intervals(axes: Axes, buckets: list[PositionBucket], ink: str) -> None:
    """A band of the 95 % intervals over documents, where they are known."""
    known = [b for b in buckets if b.loss is not None and b.low is not None and b.high is not None]
    if known:
        centres, _ = _curve(known)
        low = np.array([b.low for b in known], dtype=float)
        high = np.array([b.high for b in known], dtype=float)
        axes.fill_between(centres, low, high, color=ink, alpha=0.15, linewidth=0, zorder=2)


def _is_few(bucket: PositionBucket) -> bool:
    return bucket.documents is not None and bucket.documents < LEAST_DOCUMENTS


def _hatch_empty(axes: Axes, evaluations: list[Evaluation]) -> None:
    filled: set[tuple[int, int]] = set()
    empty: set[tuple[int, int]] = set()
    for one in evaluations:
        for bucket in one.by_position:
            span = (bucket.start, bucket.stop)
            (empty if bucket.loss is None else filled).add(span)
    for number, (start, stop) in enumerate(sorted(empty - filled)):
        axes.axvspan(start + 1, stop, facecolor="#f4f4f4", edgecolor="#bbbbbb", hatch="///",
                     linewidth=0, zorder=1, label="no data" if number == 0 else "_")  # fmt: skip
