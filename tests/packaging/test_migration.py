"""docs/migration.md leads to modules that are there, from modules that are not."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = re.compile(r"`([\w.]+)`")


def is_there(name: str) -> bool:
    place = ROOT / "megahybrid" / name.removeprefix("megahybrid.").replace(".", "/")
    return place.is_dir() or place.with_suffix(".py").exists()


def test_the_modules_of_the_table_are_there() -> None:
    text = (ROOT / "docs/migration.md").read_text().partition("## Modules")[2]
    rows = [row for row in text.splitlines() if row.startswith("| `") and "…" not in row]
    assert len(rows) > 40
    for row in rows:
        _, old, new, _ = row.split("|")
        assert not any(is_there(name) for name in CODE.findall(old)), old
        assert CODE.findall(new) and all(is_there(name) for name in CODE.findall(new)), new
