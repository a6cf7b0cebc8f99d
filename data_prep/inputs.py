"""The files that inputs name, cut into units of work that do not depend on the workers."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megahybrid.data_prep import hub, tables
from megahybrid.data_prep.archives import member_ranges
from megahybrid.data_prep.items import Fields
from megahybrid.data_prep.sniff import JSON_LINES, Format, NotText, detect_format
from megahybrid.errors import DataError

UNIT_BYTES = 8 * 2**20
LEAST_UNIT_BYTES = 2**20
FEWEST_UNITS = 32  # of inputs that have as much: with few, workers wait for the last one
MOST_UNITS = 100_000  # beyond it units grow: each is a handful of files
UNREAD = (".xz", ".bz2", ".lz4", ".rar", ".7z", ".arrow", ".feather", ".orc")


@dataclass(frozen=True)
class InputFile:
    """A file that is read, its bytes on disk (0 for what is not on disk) and how it is read.

    shown: what it is called, where that is not its path; held, digest: of a stream that lies in a
    file without a name, which is gone when nobody holds it, and the sha256 of its bytes.
    """

    path: Path
    size: int
    format: Format
    shown: str = ""
    held: BinaryIO | None = None
    digest: str = ""


@dataclass(frozen=True)
class InputRange:
    """Lines of a file that begin in [start, stop), row groups of a table, or a whole file.

    `size`: bytes on disk, to share out the work, to show progress and to weigh what is lost.
    """

    path: str
    start: int
    stop: int
    size: int
    format: Format
    shown: str


@dataclass(frozen=True)
class Unit:
    """The work that one worker does at a time."""

    ranges: tuple[InputRange, ...]

    @property
    def bytes(self) -> int:
        """The size of its input."""
        return sum(part.size for part in self.ranges)

    @property
    def of_rows(self) -> bool:
        """True for a shard of a hub dataset, whose bytes are not known."""
        return self.ranges[0].format.kind == "hub"


def named_entries(given: str | Path, pattern: str) -> list[Path]:
    """The files that one input names, sorted; of a folder also links that lead to no file."""
    if hub.is_hub(given):
        return [Path(given)]
    path = Path(given)
    if path.is_dir():
        entries = _searched(path, pattern)
    elif path.exists():
        entries = [path]
        if path.suffix.lower() in UNREAD:
            raise DataError(
                f"input {path} is {path.suffix}, which is not read (lines of JSON, text, both also "
                "as .gz or .zst, .parquet, .tar and .zip are). Unpack it first."
            )
    else:
        entries = _globbed(path, pattern) if any(sign in str(path) for sign in "*?[") else []
    if not entries:
        raise DataError(
            f"input {given} names no file (pattern {pattern}). Correct the path or --glob."
        )
    return entries


def _searched(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder, and links that lead to no file."""
    if "**" in pattern:
        _refuse_closed(folder)
    return sorted(
        entry
        for entry in folder.glob(pattern)
        if (entry.is_file() or entry.is_symlink()) and not _hidden(entry.relative_to(folder).parts)
    )


def _globbed(written: Path, pattern: str) -> list[Path]:
    """Return the files that a glob names, and those of the folders among them, as a shell does.

    Hidden names are found only where the glob spells them.
    """
    parts = written.parts
    literal = next(i for i, part in enumerate(parts) if any(sign in part for sign in "*?["))
    spelt = _hidden(parts[literal:])
    anchor = Path(written.anchor)
    entries: dict[Path, None] = {}
    folders: set[Path] = set()
    for path in sorted(anchor.glob(str(written.relative_to(anchor)))):
        if _hidden(path.parts[literal:]) and not spelt:
            continue
        if path.is_file():
            entries[path] = None
        elif path.is_dir() and folders.isdisjoint(path.parents):
            folders.add(path)
            entries.update(dict.fromkeys(_searched(path, pattern)))
    return list(entries)


def _refuse_closed(folder: Path) -> None:
    """Raise DataError for a folder that may not be opened.

    A search would pass over it without a word.
    """

    def refuse(error: OSError) -> None:
        raise DataError(
            f"input {folder} has a folder that cannot be opened ({error.filename}: "
            f"{error.strerror}). Give access to it, or narrow --glob."
        )

    for place, folders, _ in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not _hidden((name,))]
        del place


def _hidden(parts: Sequence[str]) -> bool:
    return any((part[0] == "." and part != "..") or part == "__pycache__" for part in parts)


def identify(path: Path, fields: Fields, name: str | None = None) -> InputFile | NotText:
    """Return how a file is read, by its content; by its name alone where it cannot be opened."""
    if hub.is_hub(path):
        return InputFile(path, 0, Format("hub"))
    size = path.stat().st_size
    found: Format | NotText
    try:
        with open(path, "rb") as file:
            found = detect_format(file, name or path.name, fields.text, fields.format)
    except OSError:  # reading it says so
        found = Format("jsonl" if path.suffix.lower() in JSON_LINES else "text")
    return found if isinstance(found, NotText) else InputFile(path, size, found)


def shared_unit_bytes(files: Sequence[InputFile]) -> int:
    """Return the size of units of these files, the same for any number of workers."""
    share = sum(file.size for file in files) // FEWEST_UNITS
    return max(LEAST_UNIT_BYTES, min(UNIT_BYTES, share))


def cut_units(files: Sequence[InputFile], unit_bytes: int = UNIT_BYTES) -> Iterator[Unit]:
    """Units of about `unit_bytes`: ranges of long files, groups of small ones.

    A packed file cannot be entered in the middle and is one piece.
    """
    unit_bytes = max(unit_bytes, sum(file.size for file in files) // MOST_UNITS)
    group: list[InputRange] = []
    size = 0
    for file in files:
        for part in _parts_of(file, unit_bytes):
            alone = part.format.kind == "hub" or (group and group[0].format.kind == "hub")
            if group and (alone or size + part.size > unit_bytes):
                yield Unit(tuple(group))
                group, size = [], 0
            group.append(part)
            size += part.size
    if group:
        yield Unit(tuple(group))


def _parts_of(file: InputFile, unit_bytes: int) -> Iterator[InputRange]:
    for start, stop, size in _ranges(file, unit_bytes):
        path = str(file.path)
        yield InputRange(path, start, stop, size, file.format, file.shown or path)


def _ranges(file: InputFile, unit_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Yield where the parts of a file begin and end, and their bytes on disk."""
    kind, packed = file.format.kind, file.format.packed
    if kind == "hub":
        for index in range(hub.shards(file.path)):
            # Not known before it is read; a shard is a unit of its own.
            yield index, index + 1, unit_bytes
    elif kind == "zip":
        yield from member_ranges(file.path, unit_bytes)
    elif kind == "tar":
        yield 0, 1, file.size  # its members are found only by reading it
    elif kind == "parquet" and not packed:
        yield from tables.row_group_ranges(file.path, unit_bytes)
    else:
        lines = kind in ("jsonl", "strings") and not packed
        step = unit_bytes if lines else max(file.size, 1)
        for start in range(0, file.size, step):
            stop = min(file.size, start + step)
            yield start, stop, stop - start
