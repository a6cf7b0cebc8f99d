"""Pictures of the results of `evaluate SUITE` and `analyse`: needles, RULER, attention."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megahybrid.report.evaluation_files import EvaluationFile, analyses_to_draw, newest_evaluations
from megahybrid.report.plots import Picture
from megahybrid.report.rendering import identifier
from megahybrid.report.style import DPI, LINE_COLOURS, MARKERS, WIDTH_INCHES, house_style, save

# Begin, needle, context, end: the needle stands out, the rest recedes.
SEGMENT_COLOURS = {
    "begin": "#56B4E9",
    "needle": "#D55E00",
    "context": "#d9d9d9",
    "end": "#009E73",
    "learned_sink": "#CC79A7",
}


def draw_answers(directory: Path, folder: Path) -> list[Picture]:
    """Draws every needle map, RULER curve and attention picture into `folder`, as PNG."""
    return draw_results(newest_evaluations(directory), folder)


def draw_results(results: Sequence[EvaluationFile], folder: Path) -> list[Picture]:
    """Draw some results, each into pictures of its own."""
    drawn: list[tuple[str, str, Figure]] = []
    with house_style():
        for file in results:
            if file.kind == "suite":
                drawn += _of_suite(file)
            elif file.kind == "attention":
                drawn += _of_attention(file)
        pictures = []
        for name, caption, figure in drawn:
            path = folder / f"{identifier(name)}.png"  # a task's name may hold a slash
            save(figure, path)
            pictures.append(Picture(path, caption))
    return pictures


def _of_suite(file: EvaluationFile) -> list[tuple[str, str, Figure]]:
    drawn = []
    trained = file.result.get("trained_length")
    for task, told in file.result["tasks"].items():
        name = f"{file.name}_{task}"
        if told["kind"] == "needle":
            caption = (
                f"Needle in a haystack ({told['variant']}, hay: {told['haystack']}), step "
                f"{file.step:,}: share of {told['trials']} trials with every answer token right, "
                "by length and depth"
            )
            drawn.append((f"needle_{name}", caption, needle_map(told["rows"], task, trained)))
        elif told["kind"] == "ruler":
            caption = (
                f"RULER at step {file.step:,}: share of references found in generated text, "
                f"{told['trials']} trials, with the standard error"
            )
            drawn.append((f"ruler_{name}", caption, by_length(told["rows"], task, trained)))
        elif told["kind"] == "chat":
            caption = (
                f"Answers that end their turn at step {file.step:,}, by turn and tokens they may "
                f"have, {told['trials']} prompts, with the standard error"
            )
            drawn.append((f"chat_{name}", caption, by_length(told["rows"], task, None)))
        else:
            rows = [
                {
                    "task": told["kind"],
                    "length": row["length"],
                    "score": row["token_accuracy"],
                    "standard_error": None,
                }
                for row in told["by_length"]
            ]
            caption = f"{task} ({told['kind']}) at step {file.step:,}: answer tokens right"
            drawn.append((f"puzzle_{name}", caption, by_length(rows, task, trained)))
    return drawn


def needle_map(rows: list[dict[str, Any]], title: str, trained: int | None) -> Figure:
    """Depth down, length across; each cell says its rate. A line ends the trained lengths."""
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    cells = np.full((len(depths), len(lengths)), np.nan)
    for row in rows:
        cells[depths.index(row["depth"]), lengths.index(row["length"])] = row["exact"]
    figure = Figure(figsize=(WIDTH_INCHES, 1.9 + 0.5 * len(depths)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(cells, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for (down, across), value in np.ndenumerate(cells):
        text = "–" if np.isnan(value) else f"{value:.2f}"
        ink = "white" if np.isnan(value) or value < 0.5 else "black"
        axes.text(across, down, text, ha="center", va="center", color=ink, fontsize=11)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("depth of the needle")
    axes.grid(False)
    axes.set_title(title)
    beyond = sum(length <= (trained or 0) for length in lengths)
    if trained and 0 < beyond < len(lengths):
        axes.axvline(beyond - 0.5, color="white", linewidth=3)
        axes.axvline(beyond - 0.5, color="black", linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xlabel(f"tokens (right of the line: longer than trained, {trained:,})")
    figure.colorbar(image, ax=axes, label="exact match", shrink=0.9)
    return figure


def by_length(rows: list[dict[str, Any]], title: str, trained: int | None) -> Figure:
    """Draw a line for each task over length; bars are standard errors."""
    figure = Figure(figsize=(WIDTH_INCHES, 4.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for index, task in enumerate(dict.fromkeys(row["task"] for row in rows)):
        mine = sorted((row for row in rows if row["task"] == task), key=lambda row: row["length"])
        axes.errorbar(
            [row["length"] for row in mine],
            [row["score"] for row in mine],
            yerr=[row["standard_error"] or 0 for row in mine],
            label=task,
            color=LINE_COLOURS[index % len(LINE_COLOURS)],
            marker=MARKERS[index // len(LINE_COLOURS) % len(MARKERS)],
            capsize=3,
        )
    lengths = sorted({row["length"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("tokens")
    axes.set_ylabel("score")
    axes.set_title(title)
    if trained and lengths[0] <= trained <= lengths[-1]:
        axes.axvline(trained, color="#555555", linestyle=(0, (4, 3)), linewidth=1.2)
        axes.annotate(" trained", (trained, 0.0), fontsize=11, color="#555555")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _of_attention(file: EvaluationFile) -> list[tuple[str, str, Figure]]:
    drawn = []
    for told in analyses_to_draw(file.result):
        depth = f", needle at {told['depth']:.0%} depth" if "depth" in told else ""
        what = (
            f"{told['task']}, {told['length']:,} tokens{depth}, {told['trials']} examples "
            f"({told['exact']:.0%} answered), step {file.step:,}"
        )
        figures = told["attention"]
        drawn.append(
            (
                f"attention_{file.name}_{told['task']}",
                f"Attention mass of question and answer by layer: {what}",
                mass_bars(figures),
            )
        )
        drawn.append(
            (
                f"heads_{file.name}_{told['task']}",
                f"Share of each head's attention that is on the needle while answering: {what}",
                head_map(figures),
            )
        )
    return drawn


def mass_bars(figures: dict[str, Any]) -> Figure:
    """Draw a bar for each layer, cut into begin, needle, context, end and learned sink; names
    coloured by kind."""
    layers = figures["layers"]
    figure = Figure(figsize=(WIDTH_INCHES, 1.8 + 0.34 * len(layers)), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    places = np.arange(len(layers))
    done = np.zeros(len(layers))
    for segment in figures["segments"]:
        share = np.array([layer["mass"][segment] for layer in layers])
        left.barh(
            places,
            share,
            left=done,
            color=SEGMENT_COLOURS[segment],
            label=segment.replace("_", " "),
        )
        done += share
    colours = _kind_colours(figures)
    left.set_yticks(places, [f"{layer['layer']} {layer['kind']}" for layer in layers])
    for tick, layer in zip(left.get_yticklabels(), layers, strict=True):
        tick.set_color(colours[layer["kind"]])
    left.set_xlim(0, 1)
    left.set_xlabel("attention mass")
    left.invert_yaxis()
    left.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4)
    right.barh(
        places,
        [layer["entropy_bits"] for layer in layers],
        color=[colours[layer["kind"]] for layer in layers],
    )
    right.set_xlabel("entropy, bits")
    return figure


def head_map(figures: dict[str, Any]) -> Figure:
    """Layers down, heads across."""
    cells = np.array(
        [[head["retrieval"] for head in layer["heads"]] for layer in figures["layers"]]
    )
    figure = Figure(figsize=(WIDTH_INCHES, 1.6 + 0.34 * len(cells)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    most = max(figures["retrieval_threshold"], float(cells.max()), 1e-9)
    image = axes.imshow(cells, vmin=0, vmax=most, cmap="cividis", aspect="auto")
    for layer, head in np.argwhere(cells >= max(figures["retrieval_threshold"], 1e-9)):
        axes.text(head, layer, "●", ha="center", va="center", color="#D55E00", fontsize=9)
    colours = _kind_colours(figures)
    axes.set_yticks(
        range(len(cells)), [f"{layer['layer']} {layer['kind']}" for layer in figures["layers"]]
    )
    for tick, layer in zip(axes.get_yticklabels(), figures["layers"], strict=True):
        tick.set_color(colours[layer["kind"]])
    axes.set_xticks(range(cells.shape[1]))
    axes.set_xlabel(f"head (●: at least {figures['retrieval_threshold']:g})")
    axes.grid(False)
    figure.colorbar(image, ax=axes, label="needle mass")
    return figure


def _kind_colours(figures: dict[str, Any]) -> dict[str, str]:
    kinds = list(figures["by_kind"])
    return {kind: LINE_COLOURS[index % len(LINE_COLOURS)] for index, kind in enumerate(kinds)}
