"""Charts of the results of `evaluate SUITE`: needles by depth and length, RULER, puzzles."""

from collections.abc import Sequence
from typing import Any

from megahybrid.report.evaluation_files import EvaluationFile
from megahybrid.report.figures import (
    DASHES,
    FAINT,
    SYMBOLS,
    Figure,
    axis,
    colour,
    layout,
    line,
    short_tokens,
)
from megahybrid.report.parts import Chart, Heading, Missing, Part, Table
from megahybrid.report.record import RunRecord

Found = Sequence[tuple[RunRecord, list[EvaluationFile]]]


def needle_parts(found: Found) -> list[Part]:
    """A map for each needle task of each run; what is missing, with the command for it."""
    parts: list[Part] = []
    several = len(found) > 1
    for record, results in found:
        tasks = [(one, *task) for one in results for task in _tasks(one, ("needle",))]
        parts += [_needle_map(record, one, name, told, several) for one, name, told in tasks]
        if not tasks:
            parts.append(
                Missing(
                    f"needle in a haystack ({record.name})",
                    "no suite with needles was run on a checkpoint",
                    f"megahybrid evaluate {record.directory} configs/suites/needles.yaml",
                )
            )
    return parts


def _tasks(file: EvaluationFile, kinds: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    if file.kind != "suite":
        return []
    return [(n, told) for n, told in file.result["tasks"].items() if told["kind"] in kinds]


def _needle_map(
    record: RunRecord, file: EvaluationFile, name: str, told: dict[str, Any], several: bool
) -> Chart:
    rows, trained = told["rows"], file.result.get("trained_length")
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    cells = {(row["depth"], row["length"]): row for row in rows}
    grid = [[cells.get((depth, length)) for length in lengths] for depth in depths]
    across, down = [f"{n:,}" for n in lengths], [f"{depth:.0%}" for depth in depths]
    texts = [[_cell_words(cell) for cell in row] for row in grid]
    data = [{
        "type": "heatmap", "x": across, "y": down, "zmin": 0, "zmax": 1, "colorscale": "Cividis",
        "z": [[None if cell is None else round(cell["exact"], 4) for cell in row] for row in grid],
        "text": [[None if c is None else f"{c['exact']:.2f}" for c in row] for row in grid],
        "texttemplate": "%{text}", "customdata": texts, "xgap": 2, "ygap": 2,
        "hovertemplate": "%{x} tokens, depth %{y}<br>%{customdata}<extra></extra>",
        "colorbar": {"thickness": 12, "title": {"text": "exact match", "side": "right"}, "len": 1},
    }]  # fmt: skip
    plan = layout(
        axis("tokens of the whole question", type="category"),
        axis("depth of the needle", type="category", autorange="reversed"),
        hovermode="closest", showlegend=False,
    )  # fmt: skip
    plan["height"] = 130 + 44 * len(depths)
    beyond = sum(length <= (trained or 0) for length in lengths)
    if trained and 0 < beyond < len(lengths):
        plan["shapes"] = [{
            "type": "line", "xref": "x", "yref": "paper", "x0": beyond - 0.5, "x1": beyond - 0.5,
            "y0": 0, "y1": 1, "line": {"color": "#D55E00", "width": 2.5, "dash": "dash"},
        }]  # fmt: skip
    says = (
        f"A sentence is hidden in a text ({told['haystack'].replace('_', '-')}; "
        f"{told['variant'].replace('_', '-')} needle) and asked for at its end. Each cell is the "
        f"share of {told['trials']} trials in which every token of the answer was the likeliest "
        f"one, at step {file.step:,}."
    )
    if trained and 0 < beyond < len(lengths):
        says += f" Right of the line: longer than any text in training ({trained:,})."
    title = f"{record.name}: {name}" if several else f"Needle: {name.replace('_', ' ')}"
    return Chart(
        f"needle-{record.slug}-{file.name}-{name}", title, says, {"data": data, "layout": plan},
        _needle_table(rows),
    )  # fmt: skip


def _cell_words(row: dict[str, Any] | None) -> str | None:
    if row is None:
        return None
    words = f"exact {row['exact']:.2f}"
    if "exact_low" in row:
        words += f" (95 %: {row['exact_low']:.2f}–{row['exact_high']:.2f})"
    if "token_accuracy" in row:
        words += f"<br>answer tokens right {row['token_accuracy']:.2f}"
        words += f"<br>log-likelihood per token {row['log_likelihood_per_token']:.2f}"
    return words


def _needle_table(rows: list[dict[str, Any]]) -> Table:
    head = ("length", "depth %", "trials", "exact", "low (95 %)", "high (95 %)", "tokens right",
            "log-likelihood/token")  # fmt: skip
    names = ("trials", "exact", "exact_low", "exact_high", "token_accuracy",
             "log_likelihood_per_token")  # fmt: skip
    return Table(
        head,
        [[row["length"], 100 * row["depth"], *(row.get(name) for name in names)] for row in rows],
    )


def by_length_parts(found: Found) -> list[Part]:
    """RULER and puzzles by length; what is missing, with the command for it."""
    parts: list[Part] = []
    several = len(found) > 1
    for record, results in found:
        ruler = [(one, *task) for one in results for task in _tasks(one, ("ruler",))]
        for one, name, told in ruler:
            parts.append(_by_length(record, one, name, told, told["rows"], several))
        if not ruler:
            parts.append(
                Missing(
                    f"RULER by length ({record.name})",
                    "no suite with RULER was run on a checkpoint",
                    f"megahybrid evaluate {record.directory} configs/suites/ruler.yaml",
                )
            )
    for record, results in found:
        kinds = ("recall", "copy", "induction", "phonebook")
        puzzles = [(one, *task) for one in results for task in _tasks(one, kinds)]
        if puzzles:
            rows = [
                {"task": name, "length": row["length"], "score": row["token_accuracy"],
                 "standard_error": None, "trials": told["trials"]}
                for _, name, told in puzzles for row in told["by_length"]
            ]  # fmt: skip
            one = puzzles[0][0]
            parts.append(_by_length(record, one, "puzzles", {"kind": "puzzles"}, rows, several))
        for file in results:
            for name, told in _tasks(file, ("chat",)):
                parts.append(_by_length(record, file, name, told, told["rows"], several))
    return parts


def _by_length(
    record: RunRecord,
    file: EvaluationFile,
    name: str,
    told: dict[str, Any],
    rows: list[dict[str, Any]],
    several: bool,
) -> Chart:
    # An answer's length says nothing of the rows that were learnt.
    trained = None if told["kind"] == "chat" else file.result.get("trained_length")
    data: list[Figure] = []
    for index, task in enumerate(dict.fromkeys(row["task"] for row in rows)):
        mine = sorted((row for row in rows if row["task"] == task), key=lambda row: row["length"])
        one = line(
            [row["length"] for row in mine], [row["score"] for row in mine],
            task.replace("_", " "), colour=colour(index), dash=DASHES[index // 6 % 4],
            markers=SYMBOLS[index // 6 % 6], hovertemplate="%{y:.2f}",
        )  # fmt: skip
        if any(row["standard_error"] for row in mine):
            errors = [row["standard_error"] or 0 for row in mine]
            one["error_y"] = {"type": "data", "array": errors, "thickness": 1.2, "width": 3}
        data.append(one)
    lengths = sorted({row["length"] for row in rows})
    x_axis = axis("tokens", type="log", tickvals=lengths, ticktext=[f"{n:,}" for n in lengths])
    plan = layout(x_axis, axis("score", range=[-0.04, 1.04]), height=400)
    if trained and lengths[0] <= trained <= lengths[-1]:
        plan["shapes"] = [{
            "type": "line", "xref": "x", "yref": "paper", "x0": trained, "x1": trained, "y0": 0,
            "y1": 1, "line": {"color": FAINT, "width": 1.5, "dash": "dot"},
        }]  # fmt: skip
    title, says = _told(told)
    says += f" Step {file.step:,}."
    if trained:
        says += f" The model was trained at {short_tokens(trained)} tokens."
    table = Table(
        ("task", "length", "trials", "score", "standard error"),
        [[r["task"], r["length"], r.get("trials"), r["score"], r["standard_error"]] for r in rows],
    )
    return Chart(
        f"by-length-{record.slug}-{file.name}-{name}",
        f"{record.name}: {title}" if several else title,
        says, {"data": data, "layout": plan}, table,
    )  # fmt: skip


def _told(told: dict[str, Any]) -> tuple[str, str]:
    """The title of a chart by length, and what it shows."""
    match told["kind"]:
        case "ruler":
            return "RULER by length", (
                "RULER's tasks in our own words: the share of the right answers found in text the "
                f"model wrote, over {told.get('trials')} trials, with the standard error."
            )
        case "chat":
            return "Answers that end", (
                "Prompts of held-out conversations: the share of answers that end their turn "
                f"within so many tokens, by turn, over {told.get('trials')} prompts."
            )
        case _:
            return "Puzzles by length", (
                "Small puzzles over tokens: the share of answer tokens that were the likeliest."
            )


def harness_parts(found: Found) -> list[Part]:
    """Figures of lm-evaluation-harness as a table."""
    rows: list[list[Any]] = []
    for record, results in found:
        for one in results:
            if one.kind != "lm_eval":
                continue
            for task, figures in one.result["results"].items():
                for metric, value in figures.items():
                    if isinstance(value, float) and "stderr" not in metric:
                        error = figures.get(metric.replace(",", "_stderr,", 1))
                        known = error if isinstance(error, float) else None
                        rows.append([record.name, task, metric.split(",")[0], value, known])
    if not rows:
        record = found[0][0]
        return [
            Missing("public benchmarks", "no checkpoint went through lm-evaluation-harness",
                    f"megahybrid evaluate {record.directory} --lm-eval TASK …")
        ]  # fmt: skip
    return [
        Heading("lm-evaluation-harness"),
        Table(("run", "task", "metric", "value", "standard error"), rows),
    ]
