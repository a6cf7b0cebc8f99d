"""The files that inputs name, cut into units of work that do not depend on the workers."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep import hub, tables
from data_prep.archives import is_archive, member_ranges
from data_prep.compressed import kind_of
from megahybrid.errors import DataError

UNIT_BYTES = 8 * 2**20
LEAST_UNIT_BYTES = 2**20
FEWEST_UNITS = 32  # of inputs that have as much: with few, workers wait for the last one
MOST_UNITS = 100_000  # beyond it units grow: each is a handful of files
JSON_LINES = (".jsonl", ".ndjson")
UNREAD = (".xz", ".bz2", ".lz4", ".rar", ".7z", ".arrow", ".feather", ".orc")


@dataclass(frozen=True)
class Piece:
    """Lines of a .jsonl file that begin in [start, stop), row groups of a table, or a whole file.

    `size`: bytes on disk, to share out the work and to show progress.
    """

    path: str
    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class Unit:
    """What one worker does at a time."""

    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        """Size of its input."""
        return sum(piece.size for piece in self.pieces)


@dataclass(frozen=True)
class Fields:
    """Of a row: the text's field, and those that are kept beside the tokens. `found` counts the
    rows that had each of these."""

    text: str = "text"
    kept: tuple[str, ...] = ()
    found: Counter[str] = field(default_factory=Counter)

    def note(self, row: Mapping[str, Any]) -> bytes:
        """What is kept of a row, as JSON; nothing where nothing is to be kept."""
        if not self.kept:
            return b""
        value = {name: row[name] for name in self.kept if name in row}
        self.found.update(value.keys())
        return json.dumps(value, default=str).encode()


def list_files(inputs: Sequence[str | Path], pattern: str = "**/*") -> list[Path]:
    """The files that `inputs` (files, folders searched by `pattern`, globs) name, each once.

    `hf:NAME` stands for a Hugging Face dataset and is kept as it is. Sorted within each input.
    Raises DataError when an input names nothing, or a kind not read.
    """
    found: dict[Path, None] = {}
    for given in inputs:
        if hub.is_hub(given):
            found[Path(given)] = None
            continue
        files = _named_files(given, pattern)
        if not files:
            raise DataError(
                f"input {given} names no file (pattern {pattern}). Correct the path or --glob."
            )
        for file in files:
            if file.suffix.lower() in UNREAD:
                raise DataError(
                    f"input {file} is {file.suffix}, which is not read (.jsonl, text, both also as "
                    ".gz or .zst, .parquet, .tar and .zip are). Unpack it first, or narrow --glob."
                )
            found[file] = None
    return list(found)


def _named_files(given: str | Path, pattern: str) -> list[Path]:
    path = Path(given)
    if path.is_dir():
        return sorted(
            entry
            for entry in path.glob(pattern)
            if entry.is_file() and not _hidden(entry.relative_to(path))
        )
    if path.exists():
        return [path]
    anchor = Path(path.anchor)
    relative = str(path.relative_to(anchor)) if path.anchor else str(path)
    globbed = anchor.glob(relative) if any(c in relative for c in "*?[") else ()
    return sorted(entry for entry in globbed if entry.is_file())


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in relative.parts)


def format_of(path: str | Path) -> str:
    """jsonl, parquet or text, whatever it is packed in."""
    name = Path(path)
    suffix = (Path(name.stem) if kind_of(name) else name).suffix.lower()
    return {".parquet": "parquet"}.get(suffix, "jsonl" if suffix in JSON_LINES else "text")


def shared_unit_bytes(files: Sequence[Path]) -> int:
    """How large units of these files are to be, for any number of workers."""
    share = sum(map(size_of, files)) // FEWEST_UNITS
    return max(LEAST_UNIT_BYTES, min(UNIT_BYTES, share))


def cut_units(files: Sequence[Path], unit_bytes: int = UNIT_BYTES) -> Iterator[Unit]:
    """Units of about `unit_bytes`: ranges of long files, groups of small ones.

    A packed file cannot be entered in the middle and is one piece.
    """
    unit_bytes = max(unit_bytes, sum(map(size_of, files)) // MOST_UNITS)
    group: list[Piece] = []
    size = 0
    for file in files:
        for piece in _pieces(file, unit_bytes):
            if group and size + piece.size > unit_bytes:
                yield Unit(tuple(group))
                group, size = [], 0
            group.append(piece)
            size += piece.size
    if group:
        yield Unit(tuple(group))


def size_of(file: Path) -> int:
    """Bytes on disk; 0 for what is not on disk."""
    return 0 if hub.is_hub(file) else file.stat().st_size


def _pieces(file: Path, unit_bytes: int) -> Iterator[Piece]:
    if hub.is_hub(file):
        for index in range(hub.shards(file)):
            # Not known before it is read; a shard is a unit of its own.
            yield Piece(str(file), index, index + 1, unit_bytes)
        return
    total = file.stat().st_size
    if is_archive(file):
        for start, stop, size in member_ranges(file, unit_bytes):
            yield Piece(str(file), start, stop, size)
        return
    if kind_of(file) is None and format_of(file) == "parquet":
        for start, stop, size in tables.row_group_ranges(file, unit_bytes):
            yield Piece(str(file), start, stop, size)
        return
    step = unit_bytes if kind_of(file) is None and format_of(file) == "jsonl" else max(total, 1)
    for start in range(0, total, step):
        stop = min(total, start + step)
        yield Piece(str(file), start, stop, stop - start)
