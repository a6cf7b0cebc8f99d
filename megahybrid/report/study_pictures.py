"""Pictures of a study: scores by length, attention mass by kind of layer, loss by position."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megahybrid.report.answers import SEGMENT_COLOURS
from megahybrid.report.style import DPI, LINE_COLOURS, MARKERS, WIDTH_INCHES, house_style, save

Row = Mapping[str, Any]  # of `study.figures.tabulate`
SCORE = re.compile(r"([^.]+)\.(\d+)(\.exact)?")
LOSS = re.compile(r"loss\.([^.]+)\.(\d+)-(\d+)")
MASS = re.compile(r"([^.]+)\.(\d+)\.([^.]+)\.needle")


def draw_study(rows: Sequence[Row], columns: Sequence[str], folder: Path) -> list[Path]:
    """Draws what the rows have figures for into `folder`, as PNG. A task is drawn by its exact
    answers where `columns` name these, by answer tokens otherwise."""
    counted = [row for row in rows if row["figures"]]
    names = list(dict.fromkeys(name for row in counted for name in row["figures"]))
    paths = []
    with house_style():
        for name, figure in (
            ("scores", _scores(counted, names, columns)),
            ("masses", _masses(counted, names)),
            ("losses", _losses(counted, names)),
        ):
            if figure is not None:
                save(figure, folder / f"{name}.png")
                paths.append(folder / f"{name}.png")
    return paths


def _figure(columns: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI, layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False, sharey=True)[0])


def _lines(axes: Axes, rows: Sequence[Row], places: Mapping[float, str]) -> None:
    """Medians with least and most, a line for each variant; moved aside a little so that equal
    ones are all seen."""
    for index, row in enumerate(rows):
        shift = 1.035 ** (index - (len(rows) - 1) / 2)
        known = [(x, row["figures"][name]) for x, name in places.items() if name in row["figures"]]
        if known:
            x = np.array([place for place, _ in known]) * shift
            middle, least, most = (
                np.array([told[part] for _, told in known]) for part in ("median", "least", "most")
            )
            axes.errorbar(
                x,
                middle,
                (middle - least, most - middle),
                label=f"{row['variant']} ({len(row['counted'])} of {len(row['seeds'])})",
                color=LINE_COLOURS[index % len(LINE_COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                elinewidth=1.2,
                capsize=2.5,
            )
    axes.set_xscale("log", base=2)
    ticks = [place for place in places if len(places) < 8 or np.log2(place) % 2 == 0]
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.minorticks_off()


def _scores(rows: Sequence[Row], names: Sequence[str], columns: Sequence[str]) -> Figure | None:
    tasks: dict[str, dict[float, str]] = {}
    exact = {found[1] for name in columns if (found := SCORE.fullmatch(name)) and found[3]}
    for name in names:
        found = SCORE.fullmatch(name)
        if found and bool(found[3]) == (found[1] in exact):
            tasks.setdefault(found[1], {})[float(found[2])] = name
    if not tasks:
        return None
    figure, axes = _figure(len(tasks), 4.8)
    for part, (task, places) in zip(axes, tasks.items(), strict=True):
        _lines(part, rows, dict(sorted(places.items())))
        part.set_title(task)
        part.set_xlabel("tokens of the document")
        part.set_ylim(-0.03, 1.05)
    axes[0].set_ylabel("share right (median, range)")
    axes[-1].legend(title="variant (seeds that count)", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _losses(rows: Sequence[Row], names: Sequence[str]) -> Figure | None:
    sets: dict[str, dict[float, str]] = {}
    for name in names:
        found = LOSS.fullmatch(name)
        if found and int(found[2]) >= 8:
            middle = (int(found[2]) * (int(found[3]) + 1)) ** 0.5
            sets.setdefault(found[1], {})[middle] = name
    if not sets:
        return None
    figure, axes = _figure(len(sets), 4.8)
    for part, (name, places) in zip(axes, sets.items(), strict=True):
        _lines(part, rows, places)
        edges = [int(found[3]) + 1 for place in places.values() if (found := LOSS.fullmatch(place))]
        part.set_xticks(edges[::2], [f"{edge:,}" for edge in edges[::2]])
        part.set_title(f"held out: {name}")
        part.set_xlabel("position in the document")
    axes[0].set_ylabel("loss, nats per token")
    axes[-1].legend(title="variant (seeds that count)", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _masses(rows: Sequence[Row], names: Sequence[str]) -> Figure | None:
    """Bars by variant and kind of layer, a panel for each length."""
    looked = [found for name in names if (found := MASS.fullmatch(name))]
    if not looked:
        return None
    panels = list(dict.fromkeys((found[1], found[2]) for found in looked))
    kinds = list(dict.fromkeys(found[3] for found in looked if found[3] != "all"))
    bars = [
        (row, kind)
        for row in rows
        for kind in kinds
        if f"{panels[0][0]}.{panels[0][1]}.{kind}.needle" in row["figures"]
    ]
    figure, axes = _figure(len(panels), 1.6 + 0.34 * len(bars))
    for part, (task, length) in zip(axes, panels, strict=True):
        left = np.zeros(len(bars))
        for segment, colour in SEGMENT_COLOURS.items():
            told = [row["figures"].get(f"{task}.{length}.{kind}.{segment}") for row, kind in bars]
            if not any(told):
                continue  # learned sinks, of which no variant has any
            width = np.array([0.0 if one is None else one["median"] for one in told])
            part.barh(range(len(bars)), width, left=left, color=colour, label=segment, height=0.75)
            left += width
        part.set_title(f"{int(length):,} tokens")
        part.set_xlim(0, 1)
        part.set_xlabel("attention mass")
        part.grid(visible=False)
    labels = [
        f"{row['variant']}: {kind}" if len({k for r, k in bars if r is row}) > 1 else row["variant"]
        for row, kind in bars
    ]
    axes[0].set_yticks(range(len(bars)), labels)
    axes[0].invert_yaxis()
    handles, texts = axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=4)
    return figure
