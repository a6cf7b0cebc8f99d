"""Charts of the results of `analyse`: mass, entropy, heads, positions and lags."""

import itertools
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from megahybrid.report.answer_charts import Found
from megahybrid.report.evaluation_files import EvaluationFile, analyses_to_draw
from megahybrid.report.figures import (
    KIND_COLOURS,
    SEGMENT_COLOURS,
    Figure,
    axis,
    context_axis,
    layout,
    line,
    log_axis,
)
from megahybrid.report.near_charts import near_charts
from megahybrid.report.parts import Chart, Missing, Part, Table, listed, rounded


def attention_parts(found: Found) -> list[Part]:
    """All attention charts of every run, or the command that would measure them."""
    drawn: list[list[Chart]] = []
    near: list[Chart] = []
    rows: list[list[Any]] = []
    missing: list[Missing] = []
    segments = _segments(found)
    for record, files in found:
        mine = [one for one in files if one.kind == "attention"]
        for one in mine:
            results, tasks = one.result["results"], analyses_to_draw(one.result)
            for told in tasks:
                names = [record.name] * (len(found) > 1) + [told["task"]] * (len(tasks) > 1)
                place = f"{record.slug}-{one.name}-{told['task']}"
                title = "".join(f"{name}: " for name in names)
                drawn.append(_charts(title, one, told, place))
                figures = told["attention"]
                colours = kind_colours(_kinds(figures))
                near += near_charts(figures, colours, title, _where(one, told), place)
            if len(results) > len(tasks):
                rows += _every(record.name, results, segments)
        if not mine:
            missing.append(
                Missing(
                    f"what the heads look at ({record.name})",
                    "no checkpoint was analysed",
                    f"megahybrid analyse {record.directory}",
                )
            )
    # Charts of a kind together, so that runs and tasks stand beside one another.
    parts: list[Part] = [chart for kind in zip(*drawn, strict=True) for chart in kind]
    parts += near
    if rows:
        head = ("run", "task", "tokens", "depths", "layers", *segments, "entropy, bits",
                "distance", "sink", "retrieval")  # fmt: skip
        caption = "Attention by length of the text (means over depths and over layers of a kind)"
        parts.append(Table(head, rows, caption))
    return parts + missing


def _segments(found: Found) -> list[str]:
    """The segments that some result has: a learned sink is only where layers have one."""
    results = [
        told
        for _, files in found
        for one in files
        if one.kind == "attention"
        for told in one.result["results"]
    ]
    held = {name for told in results for name in told["attention"]["segments"]}
    return [name for name in SEGMENT_COLOURS if name in held]


def _every(run: str, results: Sequence[dict[str, Any]], segments: Sequence[str]) -> list[list[Any]]:
    """A row for each task, length and kind of layer: the charts show one length and depth."""
    rows: list[list[Any]] = []
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for told in results:
        groups.setdefault((told["task"], told["length"]), []).append(told)
    for (task, length), group in groups.items():
        depths = sorted({told["depth"] for told in group if "depth" in told})
        where = f"{depths[0]:.0%}–{depths[-1]:.0%}" if depths else None
        for kind in group[0]["attention"]["by_kind"]:
            parts = [told["attention"]["by_kind"][kind] for told in group]
            masses = [fmean(part["mass"].get(name, 0.0) for part in parts) for name in segments]
            names = ("entropy_bits", "distance", "sink", "retrieval")
            others = [fmean(part[name] for part in parts) for name in names]
            rows.append([run, task, length, where, kind, *masses, *others])
    return rows


def kind_colours(kinds: Sequence[str]) -> dict[str, str]:
    """A colour for each kind of layer, in the order of the plan."""
    return {
        kind: KIND_COLOURS[index % len(KIND_COLOURS)]
        for index, kind in enumerate(dict.fromkeys(kinds))
    }


def _where(file: EvaluationFile, told: dict[str, Any]) -> str:
    depth = f", the sentence at {told['depth']:.0%} depth" if "depth" in told else ""
    return (
        f"Task {told['task']}, {told['length']:,} tokens{depth}; {told['trials']} examples, "
        f"{told['exact']:.0%} of them answered, step {file.step:,}."
    )


def _charts(title: str, file: EvaluationFile, told: dict[str, Any], place: str) -> list[Chart]:
    figures, where = told["attention"], _where(file, told)
    return [
        _mass(figures, f"mass-{place}", f"{title}Attention mass by layer", where),
        _entropy(figures, f"entropy-{place}", f"{title}Entropy by layer", where),
        _heads(figures, f"heads-{place}", f"{title}Retrieval heads", where),
        _positions(figures, f"keys-{place}", f"{title}Attention against position", where),
        _lags(figures, f"lags-{place}", f"{title}Scores against distance", where),
    ]


def _labels(figures: dict[str, Any]) -> list[str]:
    return [f"{layer['layer']} {layer['kind']}" for layer in figures["layers"]]


def _kinds(figures: dict[str, Any]) -> list[str]:
    return [layer["kind"] for layer in figures["layers"]]


def _kind_marks(figures: dict[str, Any], x: float) -> list[Figure]:
    """A coloured square beside each layer's name, and the kinds in the legend."""
    labels, kinds = _labels(figures), _kinds(figures)
    return [
        {
            "type": "scatter", "mode": "markers", "name": f"{kind} layers",
            "x": [x for other in kinds if other == kind],
            "y": [label for label, other in zip(labels, kinds, strict=True) if other == kind],
            "marker": {"symbol": "square", "size": 11, "color": ink}, "hoverinfo": "skip",
            "cliponaxis": False,
        }
        for kind, ink in kind_colours(kinds).items()
    ]  # fmt: skip


def _by_layer(figures: dict[str, Any]) -> Figure:
    """The axis of layers, the first on top."""
    return {
        "type": "category", "autorange": "reversed", "categoryorder": "array",
        "categoryarray": _labels(figures), "ticklabelstandoff": 8,
    }  # fmt: skip


def _height(figures: dict[str, Any]) -> int:
    return 140 + max(12, min(26, 900 // len(figures["layers"]))) * len(figures["layers"])


def _mass(figures: dict[str, Any], name: str, title: str, where: str) -> Chart:
    labels, layers = _labels(figures), figures["layers"]
    data: list[Figure] = [
        {
            "type": "bar", "orientation": "h", "name": segment, "y": labels,
            "x": rounded([layer["mass"][segment] for layer in layers]),
            "marker": {"color": SEGMENT_COLOURS[segment]},
            "hovertemplate": "%{y}: %{x:.4f}",
        }
        for segment in figures["segments"]
    ]  # fmt: skip
    data += _kind_marks(figures, -0.018)
    plan = layout(
        axis("share of attention", range=[-0.03, 1], tickvals=[0, 0.25, 0.5, 0.75, 1]),
        _by_layer(figures), barmode="stack", hovermode="closest", height=_height(figures),
    )  # fmt: skip
    sunk = ", or nowhere (learned_sink)" if "learned_sink" in figures["segments"] else ""
    says = (
        "Where the words of question and answer look: the first ten tokens (begin), the hidden "
        f"sentence (needle), the question itself (end), or the rest (context){sunk}. {where}"
    )
    rows: list[list[Any]] = [
        [
            layer["layer"], layer["kind"],
            *(layer["mass"][segment] for segment in figures["segments"]),
            layer["entropy_bits"], layer["entropy_nats"], layer["max_logit"], layer["distance"],
            layer["sink"], layer["retrieval"],
        ]
        for layer in layers
    ]  # fmt: skip
    rows += [
        [
            "all", kind, *(part["mass"][segment] for segment in figures["segments"]),
            part["entropy_bits"], part["entropy_nats"], part["max_logit"], part["distance"],
            part["sink"], part["retrieval"],
        ]
        for kind, part in [*figures["by_kind"].items(), ("all", figures["all"])]
    ]  # fmt: skip
    head = ("layer", "kind", *figures["segments"], "entropy, bits", "entropy, nats", "max logit",
            "distance", "sink", "retrieval")  # fmt: skip
    return Chart(name, title, says, {"data": data, "layout": plan}, Table(head, rows))


def _entropy(figures: dict[str, Any], name: str, title: str, where: str) -> Chart:
    layers, data = figures["layers"], []
    for kind, ink in kind_colours(_kinds(figures)).items():
        mine = [layer for layer in layers if layer["kind"] == kind]
        data.append({
            "type": "bar", "orientation": "h", "name": kind, "marker": {"color": ink},
            "y": [f"{layer['layer']} {layer['kind']}" for layer in mine],
            "x": rounded([layer["entropy_bits"] for layer in mine]),
            "hovertemplate": "%{y}: %{x:.3f} bits<extra></extra>",
        })  # fmt: skip
    plan = layout(
        axis("bits"), _by_layer(figures), barmode="overlay", hovermode="closest",
        height=_height(figures),
    )  # fmt: skip
    says = (
        "How spread out a layer's attention is: n bits are as wide as an even look at 2ⁿ tokens. "
        f"A window caps it. {where}"
    )
    return Chart(name, title, says, {"data": data, "layout": plan})


def _heads(figures: dict[str, Any], name: str, title: str, where: str) -> Chart:
    layers, threshold = figures["layers"], figures["retrieval_threshold"]
    cells = [[head["retrieval"] for head in layer["heads"]] for layer in layers]
    marked = [[f"{value:.2f}" if value >= threshold else "" for value in row] for row in cells]
    across = [str(number) for number in range(len(cells[0]))]
    most = max(threshold, *(value for row in cells for value in row))
    data: list[Figure] = [{
        "type": "heatmap", "x": across, "y": _labels(figures), "zmin": 0, "zmax": most,
        "z": [rounded(row) for row in cells], "text": marked, "texttemplate": "%{text}",
        "colorscale": "Cividis", "xgap": 1, "ygap": 1,
        "hovertemplate": "layer %{y}, head %{x}: %{z:.4f}<extra></extra>",
        "colorbar": {"thickness": 12, "title": {"text": "needle mass", "side": "right"}, "len": 1},
    }]  # fmt: skip
    plan = layout(
        axis("head", type="category"), _by_layer(figures), hovermode="closest",
        showlegend=False, height=_height(figures) - 20,
    )  # fmt: skip
    heads = figures["retrieval_heads"]
    if heads:
        kinds = _kinds(figures)
        first = [f"layer {h['layer']} head {h['head']} ({kinds[h['layer']]})" for h in heads]
        found = f"{len(heads)} reach {threshold:g}: {listed(first)}."
    else:
        found = f"No head reaches {threshold:g}: none retrieves."
    says = (
        "Share of each head's attention that is on the hidden sentence while the answer is being "
        f"written. {found} {where}"
    )
    table = Table(
        ("layer", "kind", "head", "needle mass", "entropy, bits", "sink", "distance"),
        [
            [layer["layer"], layer["kind"], head["head"], head["retrieval"], head["entropy_bits"],
             head["sink"], head["distance"]]
            for layer in layers for head in layer["heads"]
        ],
    )  # fmt: skip
    return Chart(name, title, says, {"data": data, "layout": plan}, table)


def _positions(figures: dict[str, Any], name: str, title: str, where: str) -> Chart:
    edges = figures["position_edges"]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    data = [
        line(middles, part["by_position"], f"{kind} layers", colour=ink,
             hovertemplate="%{y:.3g}")
        for (kind, part), ink in zip(
            figures["by_kind"].items(), kind_colours(_kinds(figures)).values(), strict=True
        )
    ]  # fmt: skip
    y_axis = log_axis("attention per token", [value for one in data for value in one["y"]])
    plan = layout(axis("position in the text", hoverformat=",.0f"), y_axis)
    says = (
        "Mean attention that a token at each position receives from question and answer; the first "
        f"ten tokens and the last 3 % are left out. {where}"
    )
    return Chart(name, title, says, {"data": data, "layout": plan})


def _lags(figures: dict[str, Any], name: str, title: str, where: str) -> Chart:
    edges = figures["lag_edges"]
    middles = [(max(1, a) * max(1, b - 1)) ** 0.5 for a, b in itertools.pairwise(edges)]
    words = [f"{a:,}" if b - a == 1 else f"{a:,}–{b - 1:,}"
             for a, b in itertools.pairwise(edges)]  # fmt: skip
    data = []
    for (kind, part), ink in zip(
        figures["by_kind"].items(), kind_colours(_kinds(figures)).values(), strict=True
    ):
        # Lag 0 has no place on a logarithmic axis.
        data.append(
            line(middles[1:], part["logit_by_lag"][1:], f"{kind} layers", colour=ink,
                 markers="circle", text=words[1:], hovertemplate="%{y:.3f} (lag %{text})")
        )  # fmt: skip
    x_axis = context_axis(max(2, int(max(middles))), title="tokens between word and question")
    plan = layout(x_axis, axis("mean score before softmax"))
    says = (
        "Mean attention score by distance. In a layer without positions a slope here is a sense of "
        f"distance that it has learnt by itself. {where}"
    )
    return Chart(name, title, says, {"data": data, "layout": plan})
