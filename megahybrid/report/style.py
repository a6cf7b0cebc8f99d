"""The look of every picture: its colours and its sizes."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FuncFormatter
from PIL import Image

from megahybrid.printable import printable
from megahybrid.report.colours import PALETTE
from megahybrid.report.parts import short_number
from megahybrid.report.record import StageRecord

LINE_COLOURS = (*PALETTE, "#000000")  # pictures are drawn on white alone
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK = "#333333"
FAINT = "#9a9a9a"
# Legible when a page shows a picture 800 pixels wide.
WIDTH_INCHES, HEIGHT_INCHES, DPI = 9.0, 4.4, 150
MOST_LETTERS = 32  # of a label; longer names would leave the curves no room
_LETTER_INCHES = 0.085  # of a stage's label, on average

_SETTINGS: dict[Any, Any] = {
    "font.size": 12.5,
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 12.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 11.5,
    "lines.linewidth": 2.0,
    "lines.markersize": 6,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "agg.path.chunksize": 20_000,
    "text.parse_math": False,  # a name with two dollars is no formula
}


@contextmanager
def house_style() -> Iterator[None]:
    """matplotlib's settings inside the block; the caller's own return after it."""
    with matplotlib.rc_context(_SETTINGS):
        yield


def new_figure(columns: int = 1, height: float = HEIGHT_INCHES) -> tuple[Figure, list[Axes]]:
    """A figure of the house's width with axes side by side. No window, no global state."""
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI, layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def ordered_colours(count: int) -> list[str]:
    """Colours for things that have an order, such as stages: dark to light, no pale yellow."""
    viridis = matplotlib.colormaps["viridis"]
    return [to_hex(viridis(0.08 + 0.70 * i / max(1, count - 1))) for i in range(count)]


def token_axis(axes: Axes, stages: Sequence[StageRecord]) -> None:
    """Tokens of the run along x, each stage a band with its name and longest length on top."""
    begin, end = stages[0].begin, stages[-1].end
    axes.set_xlim(begin, end)
    axes.set_xlabel("tokens seen")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    for index, stage in enumerate(stages):
        if index % 2 == 0:
            axes.axvspan(stage.begin, stage.end, color="#f2f2f2", zorder=0, linewidth=0)
        if index:
            axes.axvline(stage.begin, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    _stage_labels(axes, stages)


def _stage_labels(axes: Axes, stages: Sequence[StageRecord]) -> None:
    # A band narrower than its label would put one label over the next.
    grid = axes.get_subplotspec()
    columns = grid.get_gridspec().ncols if grid else 1
    letters = 0.75 * WIDTH_INCHES / columns / _LETTER_INCHES
    span = max(1, stages[-1].end - stages[0].begin)
    for stage in stages:
        room = letters * (stage.end - stage.begin) / span
        forms = (f"{stage.name} · length {stage.longest:,}", f"{stage.name} · {stage.longest:,}")
        label = next((text for text in (*forms, stage.name) if len(text) + 1 <= room), "")
        axes.annotate(
            label,
            (0.5 * (stage.begin + stage.end), 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=11,
            color="#555555",
        )


def _short(text: str) -> str:
    text = printable(text, lines=True)
    return text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS - 1]}…"


def _shorten_labels(figure: Figure) -> None:
    """Names are other people's text: controls have no glyph, and some have no end."""
    for text in figure.findobj(Text):
        text.set_text(_short(text.get_text()))
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            names = axis.get_major_formatter()
            if isinstance(names, FixedFormatter):
                names.seq = [_short(name) for name in names.seq]


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG with at most 128 colours: a third of the size, and the page holds them all."""
    path.write_bytes(png(figure))


def png(figure: Figure) -> bytes:
    """Return the figure as the PNG that `save` writes."""
    _shorten_labels(figure)
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    image = Image.open(drawn).convert("RGB")
    image.quantize(colors=128, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    return small.getvalue()
