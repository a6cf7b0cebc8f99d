"""One picture of an analysis: where each layer looks, and which heads look at the needle."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from megahybrid.report.evaluation_files import analyses_to_draw
from megahybrid.report.figures import SEGMENT_COLOURS
from megahybrid.report.style import DPI, INK, WIDTH_INCHES, house_style, png

MOST_HEIGHT_INCHES = 12.0


def draw_heads(result: dict[str, Any]) -> bytes:
    """Return a PNG of what `analyse` found of its first task: the mass of each layer by segment,
    and for each layer and head the mass on the needle while the answer is written.

    Layers go down, heads across; where a plan has several kinds of layer each is named at its row.
    Raises KeyError where `result` is no analysis.
    """
    told = analyses_to_draw(result)[0]
    figures = told["attention"]
    layers = figures["layers"]
    with house_style():
        height = min(MOST_HEIGHT_INCHES, 2.4 + 0.17 * len(layers))
        figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI, layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.25, 1))
        _masses(left, figures)
        _needles(figure, right, figures)
        left.set_ylim(len(layers) - 0.5, -0.5)
        left.yaxis.set_major_locator(MaxNLocator(integer=True))
        left.set_ylabel("layer")
        # Two lines: a label's letters are limited.
        depth = f" at {told['depth']:.0%}" if "depth" in told else ""
        said = f"{told['trials']} examples, {told['exact']:.0%} answered"
        for axes, text in (
            (left, f"{told['task']}{depth}, {told['length']:,} tokens"),
            (right, said),
        ):
            axes.set_title(text, fontsize=11.5, fontweight="normal", color=INK, pad=26)
        return png(figure)


def _masses(axes: Axes, figures: dict[str, Any]) -> None:
    """Where question and answer look, by layer: a bar of segments that adds up to one."""
    layers = figures["layers"]
    rows = range(len(layers))
    done = [0.0] * len(layers)
    for segment in figures["segments"]:
        values = [layer["mass"][segment] for layer in layers]
        axes.barh(rows, values, left=done, height=0.82, color=SEGMENT_COLOURS[segment],
                  label=segment.replace("_", " "))  # fmt: skip
        done = [a + b for a, b in zip(done, values, strict=True)]
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("share of attention")
    axes.grid(visible=False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(figures["segments"]),
                handlelength=0.9, columnspacing=0.9, fontsize=10.5)  # fmt: skip


def _needles(figure: Figure, axes: Axes, figures: dict[str, Any]) -> None:
    """The mass of each head on the needle while the answer is written."""
    cells = [[head["retrieval"] for head in layer["heads"]] for layer in figures["layers"]]
    # A head that only just reaches the threshold must not look like the strongest there is.
    most = max(2 * figures["retrieval_threshold"], *(value for row in cells for value in row))
    image = axes.imshow(cells, aspect="auto", cmap="cividis", vmin=0, vmax=most)
    axes.set_xlabel("head")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(axis="y", left=False)
    axes.grid(visible=False)
    several = len(figures["by_kind"]) > 1
    for layer in figures["layers"] if several else ():
        axes.annotate(
            layer["kind"], (1.0, layer["layer"]), xycoords=("axes fraction", "data"), va="center",
            xytext=(4, 0), textcoords="offset points", fontsize=8.5,
        )  # fmt: skip
    bar = figure.colorbar(image, ax=axes, pad=0.14 if several else 0.03)
    bar.set_label("needle mass")
