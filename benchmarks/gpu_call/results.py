"""results.jsonl: a line for each part that begins and ends and for each figure between the two."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "results.jsonl"


@dataclass(frozen=True)
class Line:
    """One line: `kind` is begin, row, end or clocks."""

    part: str
    kind: str
    detail: dict[str, Any]


class Results:
    """Lines that are on the disk when `add` returns: whatever ends the process or the machine's
    software afterwards, they are there."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        torn = path.exists() and not path.read_bytes().endswith(b"\n")
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (held for the call)
        if torn:
            self._file.write(b"\n")  # a kill came in the middle of a line: it ends alone

    def add(self, part: str, kind: str, **detail: Any) -> None:
        """Append one line and wait until the disk has it."""
        line = {"part": part, "kind": kind, "time_unix": round(time.time(), 3), **detail}
        self._file.write(json.dumps(line).encode() + b"\n")
        os.fsync(self._file.fileno())

    def take_over(self, earlier: Path) -> None:
        """Put an earlier call's lines in front of this one's."""
        for line in read(earlier):
            self.add(line.part, line.kind, **line.detail)


def read(path: Path) -> Iterator[Line]:
    """Every whole line of a file of results; a torn one is passed over."""
    if not path.exists():
        return
    for text in path.read_bytes().splitlines():
        try:
            fields = json.loads(text)
            part, kind = str(fields.pop("part")), str(fields.pop("kind"))
        except (ValueError, KeyError, AttributeError):
            continue
        fields.pop("time_unix", None)
        yield Line(part, kind, fields)


def ended(lines: list[Line]) -> dict[str, int]:
    """Return the exit code of every part that has ended."""
    return {line.part: int(line.detail["rc"]) for line in lines if line.kind == "end"}


def lost(lines: list[Line]) -> list[str]:
    """Return the parts that began and never ended: they, or what they ran on, ended the call."""
    over = ended(lines)
    begun = dict.fromkeys(line.part for line in lines if line.kind == "begin")
    return [part for part in begun if part not in over]


def rows(lines: list[Line], part: str = "") -> list[dict[str, Any]]:
    """Return the figures of the parts whose names begin with `part`."""
    return [
        {"part": line.part, **line.detail}
        for line in lines
        if line.kind == "row" and line.part.startswith(part)
    ]
