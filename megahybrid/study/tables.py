"""The results of a study as tables for a terminal."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from megahybrid.config.study import Study

NOTHING = "–"


def runs_table(plan: Study, rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each variant: median (least – most), and the mean with its 95 % interval."""
    columns = plan.columns or _scored(rows)
    table = Table(
        box=box.HORIZONTALS,
        show_lines=True,
        title="runs that count: median, least – most, mean ± 95 %",
    )
    table.add_column("variant")
    table.add_column("seeds", justify="right")
    for column in columns:
        table.add_column(column.replace(".", "\n"), justify="right")
    for row in rows:
        if row["seeds"]:
            table.add_row(
                row["variant"],
                f"{len(row['counted'])} of {len(row['seeds'])}",
                *(_cell(row["figures"].get(column)) for column in columns),
            )
    return table


def rules_table(rules: Sequence[Mapping[str, Any]]) -> Table:
    """Each rule with its two sides and whether it holds."""
    table = Table(box=box.HORIZONTALS, title="rules, of medians")
    for column in ("rule", "left", "right", "holds"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    for rule in rules:
        holds = {True: "yes", False: "no", None: "not measured"}[rule["holds"]]
        table.add_row(rule["rule"], _number(rule["left"]), _number(rule["right"]), holds)
    return table


def _scored(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tasks at lengths, in order of length."""
    found = {name for row in rows for name in row["figures"] if re.fullmatch(r"[^.]+\.\d+", name)}
    return sorted(found, key=lambda name: (name.split(".")[0], int(name.split(".")[1])))


def _cell(told: Mapping[str, Any] | None) -> str:
    if told is None:
        return NOTHING
    spread = "" if told["interval"] is None else f" ± {told['interval']:.3f}"
    reach = f"{told['least']:.3f} – {told['most']:.3f}"
    return f"{told['median']:.3f}\n{reach}\n{told['mean']:.3f}{spread}"


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4g}"
