"""`compare`: what differs between two runs, field by field and in numbers."""

from typing import Any

from megahybrid.config.base import dump
from megahybrid.config.counting import parameters
from megahybrid.config.describe import stage_flops
from megahybrid.config.explain import show
from megahybrid.config.run import RunConfig

ABSENT = "absent"


def compare(a: RunConfig, b: RunConfig) -> list[tuple[str, Any, Any]]:
    """(dotted field, value in a, value in b) of everything that differs, then derived numbers that
    differ. A field that only one of them has is "absent" in the other."""
    differences = _differences("", dump(a), dump(b))
    derived = [(name, derive(a), derive(b)) for name, derive in _DERIVED]
    return differences + [row for row in derived if row[1] != row[2]]


_DERIVED = (
    ("(parameters)", lambda run: parameters(run.model)),
    ("(steps)", lambda run: run.stage_plan.total_steps),
    ("(tokens)", lambda run: run.stage_plan.total_tokens),
    ("(training FLOPs)", lambda run: sum(stage_flops(run, i) for i in range(len(run.stages)))),
)


def _differences(path: str, a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys: list[Any] = list(dict.fromkeys([*a, *b]))
        pairs = [(key, a.get(key, ABSENT), b.get(key, ABSENT)) for key in keys]
    elif isinstance(a, list) and isinstance(b, list) and _has_mappings(a + b):
        longest = range(max(len(a), len(b)))
        pairs = [(i, _at(a, i), _at(b, i)) for i in longest]
    else:
        return [] if a == b else [(path, a, b)]
    return [
        row
        for key, left, right in pairs
        for row in _differences(f"{path}.{key}" if path else str(key), left, right)
    ]


def _has_mappings(items: list[Any]) -> bool:
    return any(isinstance(item, dict) for item in items)


def _at(items: list[Any], index: int) -> Any:
    return items[index] if index < len(items) else ABSENT


def render_comparison(rows: list[tuple[str, Any, Any]], a: str, b: str, width: int = 110) -> str:
    """The differences as a table under the names `a` and `b`."""
    import io

    from rich import box
    from rich.console import Console
    from rich.table import Table

    if not rows:
        return f"{a} and {b} say the same.\n"
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("field", a, b):
        table.add_column(title, overflow="fold")
    for path, left, right in rows:
        table.add_row(path, _show(left), _show(right))
    text = io.StringIO()
    Console(file=text, width=width, highlight=False, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _show(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else show(value)
