"""One step of a run as a picture: the mix, and every row with its documents."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from xml.sax.saxutils import escape

import numpy as np
from jaxtyping import Int

from megahybrid.data.mixture import RowPlan

WIDTH, ROW, LEFT = 900, 14, 150  # of the rows, in pixels
FILLING = "#e8e8e8"
# By source: the shades of documents that follow one another.
COLOURS = (
    ("#4878a8", "#9dbad5"),
    ("#c4742c", "#eab78a"),
    ("#4f9150", "#a5cfa6"),
    ("#96528f", "#d3aecf"),
    ("#8a6d3b", "#cdb98f"),
    ("#3d8f95", "#9dd0d4"),
)


def batch_picture(
    title: str,
    plans: Sequence[RowPlan],
    starts: Int[np.ndarray, "rows length"],
    weights: Mapping[str, float],
) -> str:
    """An .svg of the step's rows by source beside the stage's weights, and of its first rows.

    `plans` are all rows of the step, `starts` where each token's document begins, of those to draw.
    A black line is a join: what follows it lies elsewhere on disk. What fills a row is light grey.
    """
    names = sorted({plan.source for plan in plans} | set(weights))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    rows = Counter(plan.source for plan in plans)
    parts: list[str] = []
    top = 40
    for name in names:
        wanted = weights.get(name, 0) / sum(weights.values())
        share = rows[name] / len(plans)
        parts += [
            _text(10, top + 11, name[:20]),
            _box(LEFT, top, share * WIDTH / 2, ROW, colours[name][0]),
            _box(LEFT + wanted * WIDTH / 2, top - 2, 2, ROW + 4, "black"),
            _text(
                LEFT + WIDTH / 2 + 10,
                top + 11,
                f"{rows[name]:,} rows, {share:.1%} (line: weight, {wanted:.1%})",
            ),
        ]
        top += ROW + 6
    length = starts.shape[1]
    top += 24
    parts.append(
        _text(10, top - 6, f"{len(starts)} of {len(plans):,} rows of {length:,} tokens, documents")
    )
    for number, (plan, row) in enumerate(zip(plans, starts, strict=False)):
        parts.append(_text(10, top + 11, f"{number} {plan.source[:16]}"))
        filled = sum(size for _, size in plan.spans)
        edges = [*np.unique(row[:filled]).tolist(), filled]
        for index, (begin, end) in enumerate(pairwise(edges)):
            x, width = begin * WIDTH / length, (end - begin) * WIDTH / length
            parts.append(_box(LEFT + x, top, width, ROW, colours[plan.source][index % 2]))
        if filled < length:
            x, width = filled * WIDTH / length, (length - filled) * WIDTH / length
            parts.append(_box(LEFT + x, top, width, ROW, FILLING))
        for place in accumulate(size for _, size in plan.spans[:-1]):
            parts.append(_box(LEFT + place * WIDTH / length - 1, top - 1, 2, ROW + 2, "black"))
        top += ROW + 4
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 20}" '
            f'height="{top + 10}" font-family="sans-serif" font-size="11">',
            '<rect width="100%" height="100%" fill="white"/>',
            _text(10, 20, title, 13),
            *parts,
            "</svg>\n",
        ]
    )


def _text(x: float, y: float, words: str, size: int = 11) -> str:
    return f'<text x="{x:.0f}" y="{y}" font-size="{size}">{escape(words)}</text>'


def _box(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{height}" fill="{colour}"/>'
