"""The look of every interactive chart: colours, axes, bands of stages.

Figures are Plotly's JSON, checked against its schema in tests. Text and grid lines take their
colours from the page's stylesheet, so that one figure serves light, dark and print.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megahybrid.ledger import LEAST_DOCUMENTS
from megahybrid.report.colours import PALETTE
from megahybrid.report.parts import rounded, short_tokens
from megahybrid.report.record import RunRecord, StageRecord

# Kinds of layers, in colours that no segment of the attention has.
KIND_COLOURS = ("#0072B2", "#E69F00", "#CC79A7", "#7A5195", "#8C8C8C")
SEGMENT_COLOURS = {
    "begin": "#56B4E9",
    "needle": "#D55E00",
    "context": "#A6A6A6",
    "end": "#009E73",
    "learned_sink": "#CC79A7",
}
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross")
FAINT = "rgba(128,128,128,0.65)"
BAND = "rgba(128,128,128,0.10)"
MOST_POINTS = 1200  # of one line: more than a screen has pixels for

Figure = dict[str, Any]


def colour(index: int) -> str:
    """Return the colour of the nth curve; the palette begins again where it ends."""
    return PALETTE[index % len(PALETTE)]


def line(
    x: Sequence[Any],
    y: Sequence[Any],
    name: str,
    *,
    colour: str,
    dash: str = "solid",
    width: float = 2.2,
    markers: str | None = None,
    **more: Any,
) -> Figure:
    """A line; `markers` names a symbol to set on its points."""
    return {
        "type": "scatter",
        "mode": "lines+markers" if markers else "lines",
        "x": rounded(x),
        "y": rounded(y),
        "name": name,
        "line": {"color": colour, "width": width, "dash": dash},
        "marker": {"color": colour, "size": 7, "symbol": markers or "circle"},
        **more,
    }


@dataclass(frozen=True)
class Point:
    """A mean with its 95 % interval, over so many documents (None: not known), and its place."""

    x: float
    y: float | None
    low: float | None
    high: float | None
    documents: int | None
    place: str
    same: bool = True  # False: of other documents than the points before it

    @property
    def is_sure(self) -> bool:
        """False for a mean over too few documents, or over others."""
        return self.same and (self.documents is None or self.documents >= LEAST_DOCUMENTS)


def line_of_points(
    points: Sequence[Point], name: str, *, ink: str, dash: str, symbol: str
) -> list[Figure]:
    """A line of the points that are sure, and hollow marks without a line for the others."""
    drawn = [_of_points(points, True, name, ink, dash, symbol)]
    if any(not point.is_sure and point.y is not None for point in points):
        hollow = _of_points(points, False, f"{name}, few documents", ink, dash, f"{symbol}-open")
        drawn.append(hollow | {"mode": "markers", "showlegend": False})
    return drawn


def _of_points(
    points: Sequence[Point], sure: bool, name: str, ink: str, dash: str, symbol: str
) -> Figure:
    kept = [point.is_sure is sure for point in points]
    y = [point.y if keep else None for point, keep in zip(points, kept, strict=True)]
    found = line(
        [point.x for point in points], y, name, colour=ink, dash=dash, markers=symbol,
        text=[f"{point.place}, {_documents(point)}" for point in points],
        hovertemplate="%{y:.4f} (%{text})",
    )  # fmt: skip
    spans = [
        _span(point) if keep else (None, None) for point, keep in zip(points, kept, strict=True)
    ]
    if any(above is not None for above, _ in spans):
        found["error_y"] = {
            "type": "data", "symmetric": False, "thickness": 1.2, "width": 3, "color": ink,
            "array": rounded(above for above, _ in spans),
            "arrayminus": rounded(below for _, below in spans),
        }  # fmt: skip
    return found


def _span(point: Point) -> tuple[float | None, float | None]:
    """How far the interval reaches above the mean, and below."""
    y, low, high = point.y, point.low, point.high
    if y is None or low is None or high is None or not all(map(math.isfinite, (y, low, high))):
        return None, None
    return high - y, y - low


def _documents(point: Point) -> str:
    if point.documents is None:
        return "documents not counted"
    return f"{point.documents:,} document{'s' if point.documents != 1 else ''}"


def layout(x: Figure, y: Figure, **more: Any) -> Figure:
    """Axes and the house's margins. A legend stands above, where it costs a phone no width."""
    axis: Figure = {"automargin": True, "zeroline": False, "ticks": "outside", "ticklen": 4}
    return {
        "autosize": True,
        "height": 340,
        "margin": {"l": 52, "r": 14, "t": 46 if more.get("showlegend", True) else 14, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "x unified",
        "xaxis": axis | x,
        "yaxis": axis | y,
        "showlegend": True,
        "legend": {
            "orientation": "h", "yanchor": "bottom", "y": 1.06, "xanchor": "left", "x": 0,
            "bgcolor": "rgba(0,0,0,0)", "traceorder": "normal",
        },
        **more,
    }  # fmt: skip


def axis(title: str, **more: Any) -> Figure:
    """A titled axis."""
    return {"title": {"text": title, "standoff": 8}, **more}


def log_axis(title: str, values: Iterable[float | int | None], **more: Any) -> Figure:
    """A logarithmic axis with ticks at 1, 2 and 5 times powers of ten, or at powers alone."""
    known = [value for value in values if value is not None and value > 0]
    if not known:
        return axis(title, **more)
    low = max(-300, math.floor(math.log10(min(known))))  # a double ends at 308
    high = min(300, math.ceil(math.log10(max(known))))
    steps = (1, 2, 5) if high - low <= 3 else (1,)
    ticks = [step * 10.0**power for power in range(low, high + 1) for step in steps]
    words = [f"{tick:g}" if tick >= 1e-4 else f"{tick:.0e}".replace("e-0", "e-") for tick in ticks]
    return axis(title, type="log", tickvals=ticks, ticktext=words, **more)


def token_axis(records: Sequence[RunRecord]) -> Figure:
    """Tokens of the run, as 700k, 1.5M, 3B."""
    end = max(record.stages[-1].end for record in records)
    begin = min(record.stages[0].begin for record in records)
    return axis("tokens seen", range=[begin, end], exponentformat="B", hoverformat=",d", nticks=7)


def context_axis(longest: int, shortest: int = 1, title: str = "tokens of context") -> Figure:
    """Positions on a scale of doublings, ticks at every second or third."""
    powers = range(int(np.log2(max(1, shortest))), int(np.ceil(np.log2(longest))) + 1)
    powers = powers[:: max(1, -(-len(powers) // 7))]
    return axis(
        title, type="log", tickvals=[2**n for n in powers],
        ticktext=[short_tokens(2**n) for n in powers], hoverformat=",.0f",
    )  # fmt: skip


def bands(stages: Sequence[StageRecord]) -> Figure:
    """Shapes and annotations for stages on a token axis: every other one shaded, all named."""
    span = max(1, stages[-1].end - stages[0].begin)
    shapes, notes = [], []
    for index, stage in enumerate(stages):
        if index % 2 == 0:
            shapes.append({
                "type": "rect", "xref": "x", "yref": "paper", "x0": stage.begin, "x1": stage.end,
                "y0": 0, "y1": 1, "fillcolor": BAND, "line": {"width": 0}, "layer": "below",
            })  # fmt: skip
        share = (stage.end - stage.begin) / span
        if share >= 0.12:
            label = f"{stage.name} · {short_tokens(stage.longest)}" if share > 0.2 else stage.name
            notes.append({
                "text": label, "x": (stage.begin + stage.end) / 2, "y": 1, "xref": "x",
                "yref": "paper", "yanchor": "bottom", "showarrow": False, "font": {"size": 11},
            })  # fmt: skip
    return {"shapes": shapes, "annotations": notes}


def stage_bands(records: Sequence[RunRecord]) -> Figure:
    """Bands of the only run, or of runs whose stages are the same."""
    plans = {tuple((s.name, s.begin, s.end) for s in record.stages) for record in records}
    return bands(records[0].stages) if len(plans) == 1 else {}


def thinned(
    x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS
) -> tuple[list[float | int | None], list[float | int | None], int]:
    """At most `most` points, each the mean of as many neighbours as told; gaps stay gaps."""
    together = max(1, -(-len(x) // most))
    if together > 1:
        cuts = np.arange(0, len(x), together)
        ends = np.append(cuts[1:], len(x)) - 1
        known = ~np.isnan(y)
        sums = np.add.reduceat(np.where(known, y, 0.0), cuts)
        counts = np.add.reduceat(known.astype(float), cuts)
        with np.errstate(invalid="ignore", divide="ignore"):
            x, y = x[ends], sums / counts
    return [int(v) for v in x.tolist()], rounded(y.tolist()), together


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over 2 % of the steps around each one; gaps (nan) are left out of it."""
    half = len(values) // 100
    known = ~np.isnan(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    steps = np.arange(len(values))
    begin, end = np.maximum(steps - half, 0), np.minimum(steps + half + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[end] - sums[begin]) / (counts[end] - counts[begin])
