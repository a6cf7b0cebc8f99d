"""Charts of layers with two views of their keys: the share of the near one."""

import itertools
from typing import Any

from megahybrid.report.figures import Figure, axis, context_axis, layout, line
from megahybrid.report.parts import Chart, Table, rounded


def near_charts(
    figures: dict[str, Any], colours: dict[str, str], title: str, where: str, place: str
) -> list[Chart]:
    """The share of the near view by layer and head, and by distance; none without such layers."""
    layers = [layer for layer in figures["layers"] if "near_share" in layer]
    if not layers:
        return []
    return [
        _by_head(layers, f"near-{place}", f"{title}Share of the near view", where),
        _by_lag(figures, colours, f"near-lags-{place}", f"{title}Near view and distance", where),
    ]


def _by_head(layers: list[dict[str, Any]], name: str, title: str, where: str) -> Chart:
    labels = [f"{layer['layer']} {layer['kind']}" for layer in layers]
    cells = [[head["near_share"] for head in layer["heads"]] for layer in layers]
    data: list[Figure] = [{
        "type": "heatmap", "x": [str(number) for number in range(len(cells[0]))], "y": labels,
        "z": [rounded(row) for row in cells], "zmin": 0, "zmax": 1, "colorscale": "Cividis",
        "text": [[f"{value:.2f}" for value in row] for row in cells], "texttemplate": "%{text}",
        "xgap": 1, "ygap": 1, "hovertemplate": "layer %{y}, head %{x}: %{z:.4f}<extra></extra>",
        "colorbar": {"thickness": 12, "title": {"text": "share", "side": "right"}, "len": 1},
    }]  # fmt: skip
    down = {"type": "category", "autorange": "reversed", "categoryorder": "array",
            "categoryarray": labels, "ticklabelstandoff": 8}  # fmt: skip
    height = 120 + max(12, min(26, 900 // len(layers))) * len(layers)
    plan = layout(
        axis("head", type="category"), down, hovermode="closest", showlegend=False, height=height
    )
    says = (
        "Mean share g of the near view in each head's output, g * near + (1 - g) * far, over the "
        "words of question and answer. 0 is the far view alone, 1 the near one; a split head has "
        f"one of the two. {where}"
    )
    rows = [
        [layer["layer"], layer["kind"], head["head"], head["near_share"]]
        for layer in layers
        for head in layer["heads"]
    ]
    table = Table(("layer", "kind", "head", "share of near"), rows)
    return Chart(name, title, says, {"data": data, "layout": plan}, table)


def _by_lag(
    figures: dict[str, Any], colours: dict[str, str], name: str, title: str, where: str
) -> Chart:
    edges = list(itertools.pairwise(figures["lag_edges"]))
    middles = [(max(1, a) * max(1, b - 1)) ** 0.5 for a, b in edges]
    words = [f"{a:,}" if b - a == 1 else f"{a:,}–{b - 1:,}" for a, b in edges]
    # Lag 0 has no place on a logarithmic axis.
    data = [
        line(middles[1:], part["near_by_lag"][1:], f"{kind} layers", colour=colours[kind],
             markers="circle", text=words[1:], hovertemplate="%{y:.3f} (lag %{text})")
        for kind, part in figures["by_kind"].items() if "near_by_lag" in part
    ]  # fmt: skip
    x_axis = context_axis(max(2, int(max(middles))), title="tokens between word and question")
    plan = layout(x_axis, axis("share of near", range=[0, 1]))
    says = (
        "Mean share of the near view among words whose far view looks so far back: each word "
        f"weighs as much as it looks there. {where}"
    )
    return Chart(name, title, says, {"data": data, "layout": plan})
