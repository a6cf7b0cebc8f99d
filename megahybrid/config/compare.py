"""`compare`: what differs between two runs, field by field and in numbers."""

import io
from typing import Any

from megahybrid.config.base import dump
from megahybrid.config.counting import parameters
from megahybrid.config.describe import stage_flops
from megahybrid.config.explain import show
from megahybrid.config.run import RunConfig

ABSENT = "absent"


def compare(a: RunConfig, b: RunConfig) -> list[tuple[str, Any, Any]]:
    """(dotted field, value in a, value in b) of everything that differs, then derived numbers that
    differ. A field that only one of them has is "absent" in the other, and named when it is not
    at its default."""
    differences = _differences("", _Side(dump(a), _written(a)), _Side(dump(b), _written(b)))
    derived = [(name, derive(a), derive(b)) for name, derive in _DERIVED]
    return differences + [row for row in derived if row[1] != row[2]]


_DERIVED = (
    ("(parameters)", lambda run: parameters(run.model)),
    ("(steps)", lambda run: run.stage_plan.total_steps),
    ("(tokens)", lambda run: run.stage_plan.total_tokens),
    ("(training FLOPs)", lambda run: sum(stage_flops(run, i) for i in range(len(run.stages)))),
)


def _written(run: RunConfig) -> dict[str, Any]:
    return run.model_dump(mode="python", exclude_defaults=True)


class _Side:
    """A value of one run, with every default and without."""

    def __init__(self, whole: Any, written: Any) -> None:
        self.whole, self.written = whole, written

    def item(self, key: Any) -> "_Side":
        return _Side(_item(self.whole, key), _item(self.written, key))

    def keys(self) -> list[Any]:
        if isinstance(self.whole, dict):
            return list(self.whole)
        holds_mappings = any(isinstance(item, dict) for item in self.whole)
        return list(range(len(self.whole))) if holds_mappings else []


def _item(plain: Any, key: Any) -> Any:
    if isinstance(plain, dict):
        return plain.get(key, ABSENT)
    is_there = isinstance(plain, list | tuple) and key < len(plain)
    return plain[key] if is_there else ABSENT


def _differences(path: str, a: _Side, b: _Side) -> list[tuple[str, Any, Any]]:
    if a.whole == b.whole:
        return []
    if ABSENT in (a.whole, b.whole):
        a, b = _Side(a.written, a.written), _Side(b.written, b.written)
    containers = [side for side in (a, b) if isinstance(side.whole, dict | list)]
    keys = dict.fromkeys(key for side in containers for key in side.keys())  # noqa: SIM118
    if not keys or not all(side in containers or side.whole == ABSENT for side in (a, b)):
        return [(path, a.whole, b.whole)] if a.whole != b.whole else []
    return [
        row
        for key in keys
        for row in _differences(f"{path}.{key}" if path else str(key), a.item(key), b.item(key))
    ]


def render_comparison(rows: list[tuple[str, Any, Any]], a: str, b: str, width: int = 110) -> str:
    """The differences as a table, `a` and `b` being the names of the two runs."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if not rows:
        return f"{a} and {b} say the same.\n"
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("field", no_wrap=True)
    table.add_column("a", overflow="fold")
    table.add_column("b", overflow="fold")
    for path, left, right in rows:
        table.add_row(path, _show(left), _show(right))
    text = io.StringIO()
    console = Console(file=text, width=width, highlight=False, markup=False, color_system=None)
    console.print(f"a: {a}\nb: {b}", soft_wrap=True)
    console.print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines()) + "\n"


def _show(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else show(value)
