"""Scores of suites and figures of attention as tables for a terminal."""

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.table import Table

NOTHING = "–"


def suite_tables(result: dict[str, Any]) -> Iterator[tuple[str, Table]]:
    """A title and a table for each task of what `run_suite` returned."""
    for name, task in result["tasks"].items():
        rows = task["rows"]
        if task["kind"] == "ruler":
            yield f"{name}: RULER, share of references found", _grid(rows, "task", "score")
            continue
        if task["kind"] == "chat":
            yield (
                f"{name}: answers that end their turn, by turn of the assistant",
                _grid(rows, "task", "score"),
            )
            yield f"{name}: of all answers", _ended(task["ended"])
            continue
        if task["kind"] == "needle":
            title = (
                f"{name}: needle ({task['variant']}, hay: {task['haystack']}), exact match "
                f"by depth and length, {task['trials']} trials a cell"
            )
            yield title, _grid(rows, "depth", "exact")
        table = _table("length")
        for column in ("trials", "exact", "95 %", "tokens right", "log-lik./token"):
            table.add_column(column, justify="right")
        for row in task["by_length"]:
            table.add_row(
                f"{row['length']:,}",
                f"{row['trials']:,}",
                f"{row['exact']:.3f}",
                f"{row['exact_low']:.3f} – {row['exact_high']:.3f}",
                f"{row['token_accuracy']:.3f}",
                f"{row['log_likelihood_per_token']:.3f}",
            )
        yield f"{name}: {task['kind']} by length", table


def attention_tables(figures: dict[str, Any]) -> Iterator[tuple[str, Table]]:
    """Means by kind of layer and by layer, entropy in bits, and the retrieval heads."""
    by_kind = {f"{kind} ({part['layers']})": part for kind, part in figures["by_kind"].items()}
    yield "By kind of layer", _attention(by_kind | {"all": figures["all"]}, "layers")
    by_layer = {f"{part['layer']} {part['kind']}": part for part in figures["layers"]}
    yield "By layer", _attention(by_layer, "layer")
    heads = figures["retrieval_heads"]
    if heads:
        table = _table("layer")
        for column in ("head", "needle mass while answering"):
            table.add_column(column, justify="right")
        for head in heads[:20]:
            table.add_row(str(head["layer"]), str(head["head"]), f"{head['score']:.4f}")
        title = f"Retrieval heads (at least {figures['retrieval_threshold']:g})"
        yield title + (f", 20 of {len(heads)}" if len(heads) > 20 else ""), table


def _attention(parts: dict[str, dict[str, Any]], first: str) -> Table:
    table = _table(first)
    table.columns[0].no_wrap = True
    segments = [name.replace("_", " ") for name in next(iter(parts.values()))["mass"]]
    names = (*segments, "bits", "max logit", "distance", "sink")
    shares = any("near_share" in part for part in parts.values())
    for column in (*names, "retrieval", *(["near"] if shares else [])):
        table.add_column(column, justify="right")
    for name, part in parts.items():
        table.add_row(
            name,
            *(f"{value:.4f}" for value in part["mass"].values()),
            f"{part['entropy_bits']:.2f}",
            f"{part['max_logit']:.1f}",
            f"{part['distance']:,.1f}",
            f"{part['sink']:.4f}",
            f"{part['retrieval']:.4f}",
            *([f"{part['near_share']:.3f}" if "near_share" in part else NOTHING] * shares),
        )
    return table


def _grid(rows: list[dict[str, Any]], down: str, value: str) -> Table:
    lengths = sorted({row["length"] for row in rows})
    table = _table(down)
    for length in lengths:
        table.add_column(f"{length:,}", justify="right")
    cells = {(row[down], row["length"]): row[value] for row in rows}
    for name in dict.fromkeys(row[down] for row in rows):
        found = [cells.get((name, length)) for length in lengths]
        table.add_row(str(name), *(NOTHING if v is None else f"{v:.3f}" for v in found))
    return table


def _ended(rows: list[dict[str, Any]]) -> Table:
    table = _table("within tokens")
    for column in ("prompts", "ended", "95 %", "as in the set"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row['length']:,}",
            f"{row['trials']:,}",
            f"{row['ended']:.3f}",
            f"{row['ended_low']:.3f} – {row['ended_high']:.3f}",
            f"{row['exact']:.3f}",
        )
    return table


def _table(first_column: str) -> Table:
    table = Table(box=box.HORIZONTALS)
    table.add_column(first_column)
    return table
