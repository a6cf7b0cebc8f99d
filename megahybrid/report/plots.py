"""The pictures of a run. Each is a function of the record that returns a figure, or None where
there is nothing to draw."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from megahybrid.report.by_position import draw_by_position, loss_by_position
from megahybrid.report.figures import running_mean
from megahybrid.report.record import RunRecord
from megahybrid.report.style import (
    FAINT,
    LINE_COLOURS,
    MARKERS,
    house_style,
    new_figure,
    save,
    short_number,
    token_axis,
)


@dataclass(frozen=True)
class Picture:
    """A picture on disk and what it shows, in words."""

    path: Path
    caption: str


def draw_all(record: RunRecord, folder: Path) -> list[Picture]:
    """Draws every picture that the run has data for into `folder`, as PNG."""
    pictures = []
    drawers: tuple[tuple[str, str, Callable[[RunRecord], Figure | None]], ...] = (
        ("overview", "Loss over tokens, and by position after each stage", overview),
        ("loss", "Training and held-out loss over tokens", loss),
        ("loss_by_position", "Held-out loss by position, after each stage", loss_by_position),
        ("learning_rate", "Learning rate over tokens", learning_rate),
        ("gradient_norm", "Gradient norm before clipping, in all and by kind", gradient_norm),
        ("throughput", "Throughput over tokens", throughput),
    )
    with house_style():
        for name, caption, draw in drawers:
            figure = draw(record)
            if figure is not None:
                path = folder / f"{name}.png"
                save(figure, path)
                pictures.append(Picture(path, caption))
    return pictures


def overview(record: RunRecord) -> Figure | None:
    """Loss over tokens beside loss by position: the run at a glance."""
    sets = [name for name in record.held_out_sets() if record.at_stage_ends(name)]
    if not sets:
        return None
    figure, (left, right) = new_figure(columns=2, height=4.6)
    draw_loss(left, record)
    left.set_title("Loss", pad=24)
    farthest = max(sets, key=lambda name: _farthest(record, name))
    draw_by_position(right, record, farthest)
    right.set_title("Loss by position", pad=24)
    right.annotate(f"held-out set: {farthest}", (0.0, 1.0), xycoords="axes fraction",
                   xytext=(0, 3), textcoords="offset points", va="bottom", fontsize=11,
                   color="#555555")  # fmt: skip
    return figure


def loss(record: RunRecord) -> Figure:
    """Training loss (each step faint, their running mean bold) and held-out losses."""
    figure, (axes,) = new_figure()
    draw_loss(axes, record)
    axes.set_title("Loss", pad=24)
    return figure


def draw_loss(axes: Axes, record: RunRecord) -> None:
    """The loss curves into given axes."""
    tokens, values = record.column("tokens"), record.column("loss")
    token_axis(axes, record.stages)
    axes.plot(tokens, values, color=LINE_COLOURS[0], alpha=0.25, linewidth=0.8)
    axes.plot(tokens, running_mean(values), color=LINE_COLOURS[0], label="training")
    for index, held_out in enumerate(record.held_out_sets(), start=1):
        scores = [one for one in record.scores(held_out, "stream") if one.loss is not None]
        if scores:
            axes.plot(
                [one.run_tokens for one in scores],
                np.array([one.loss for one in scores], dtype=float),
                color=LINE_COLOURS[index % len(LINE_COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                linewidth=1.4,
                markeredgecolor="white",
                label=f"held out: {held_out}",
                clip_on=False,
                zorder=3,
            )
    skipped = [line.tokens for line in record.steps if line.skipped]
    if skipped:
        axes.plot(skipped, np.zeros(len(skipped)), "|", color="#B00020", markersize=12,
                  markeredgewidth=2, transform=axes.get_xaxis_transform(), clip_on=False,
                  label="update skipped")  # fmt: skip
    axes.set_ylabel("loss (nats per token)")
    axes.legend(loc="upper right")


def learning_rate(record: RunRecord) -> Figure:
    """The learning rate each step used."""
    figure, (axes,) = new_figure(height=3.4)
    token_axis(axes, record.stages)
    axes.plot(record.column("tokens"), record.column("learning_rate"), color=LINE_COLOURS[0])
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("learning rate")
    axes.set_title("Learning rate", pad=24)
    return figure


def gradient_norm(record: RunRecord) -> Figure | None:
    """The global gradient norm before clipping, and its parts by kind of parameter."""
    tokens, norms = record.column("tokens"), record.column("gradient_norm")
    if np.isnan(norms).all():
        return None
    figure, (axes,) = new_figure()
    token_axis(axes, record.stages)
    kinds = list(
        dict.fromkeys(kind for line in record.steps for kind in line.gradient_norm_by_kind)
    )
    for index, kind in enumerate(kinds, start=1):
        values = [line.gradient_norm_by_kind.get(kind) for line in record.steps]
        part = np.array([value or np.nan for value in values], dtype=float)
        if np.isnan(part).all():  # a tied head has no gradient of its own
            continue
        colour = LINE_COLOURS[index % len(LINE_COLOURS)]
        style = ("-", "--", ":")[index // len(LINE_COLOURS) % 3]
        axes.plot(tokens, running_mean(part), color=colour, linewidth=1.4, linestyle=style,
                  label=kind.replace("_", " "))  # fmt: skip
    axes.plot(tokens, norms, color=LINE_COLOURS[0], alpha=0.2, linewidth=0.8)
    axes.plot(
        tokens, running_mean(norms), color=LINE_COLOURS[0], linewidth=2.4, label="all parameters"
    )
    clip = record.config.optimizer.clip_norm if record.config else None
    if clip is not None:
        axes.axhline(clip, color=FAINT, linestyle=(0, (5, 3)), linewidth=1.2, zorder=1,
                     label=f"clipped above {clip:g}")  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("gradient norm (before clipping)")
    axes.set_title("Gradient norm", pad=24)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def throughput(record: RunRecord) -> Figure | None:
    """Tokens per second of each step with each stage's median; MFU beside it where known."""
    speeds, shares = record.column("tokens_per_second"), record.column("mfu")
    if np.isnan(speeds).all():
        return None
    both = not np.isnan(shares).all()
    figure, panels = new_figure(columns=2 if both else 1, height=3.6)
    axes = panels[0]
    _per_stage(axes, record, speeds)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axes.set_ylabel("tokens per second")
    axes.set_title("Throughput", pad=24)
    if both:
        _per_stage(panels[1], record, shares)
        panels[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        panels[1].set_ylabel("share of peak FLOP/s")
        panels[1].set_title("MFU (exact causal pairs)", pad=24)
    return figure


def _per_stage(axes: Axes, record: RunRecord, values: np.ndarray) -> None:
    tokens = record.column("tokens")
    token_axis(axes, record.stages)
    axes.plot(tokens, values, ".", color=LINE_COLOURS[0], alpha=0.45, markersize=3.5,
              markeredgewidth=0, label="each step")  # fmt: skip
    begin = 0
    for index, stage in enumerate(record.stages):
        part = values[begin : begin + len(stage.steps)]
        begin += len(stage.steps)
        if not np.isnan(part).all():
            median = float(np.nanmedian(part))
            axes.hlines(median, stage.begin, stage.end, color=LINE_COLOURS[1], linewidth=2.2,
                        zorder=3, label="median of the stage" if index == 0 else "_")  # fmt: skip
    # One stalled step must not flatten all others against the axis.
    finite = values[~np.isnan(values)]
    axes.set_ylim(0, 1.25 * float(np.quantile(finite, 0.98)))
    axes.legend(loc="lower right", markerscale=3)


def _farthest(record: RunRecord, held_out: str) -> int:
    filled = [
        bucket.stop
        for one in record.at_stage_ends(held_out)
        for bucket in one.by_position
        if bucket.loss is not None
    ]
    return max(filled, default=0)
