"""Draws a run's page with each of some damages in turn: `python draw_damaged.py DAMAGES.json`.

A script of its own, outside the suite: there every call's annotations are checked, and a value of a
wrong type would be seen before the reader that has to see it.
"""

import json
import sys
import traceback
from pathlib import Path

from megahybrid.errors import MegahybridError
from megahybrid.report.page import content, read_runs


def draw(run: Path) -> str:
    """What is said about a run that cannot be drawn, "" of one that can."""
    try:
        main, *numbers = content(read_runs([run]))
    except MegahybridError as error:
        return str(error)
    json.dumps(numbers, allow_nan=False).encode()
    main.encode()
    return ""


def draw_each(run: Path, damages: list[tuple[str, str]]) -> list[str]:
    """What is said of each damage, a file and its text; a traceback where it is not said."""
    said = []
    for path, text in damages:
        before = Path(path).read_text()
        Path(path).write_text(text)
        try:
            said.append(draw(run))
        except Exception:
            said.append(traceback.format_exc())
        Path(path).write_text(before)
    return said


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps(draw_each(Path(given["run"]), given["damages"])))
