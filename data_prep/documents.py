"""Reading documents: .jsonl (one a line) and any other text file (one a file).

Inputs are cut into units of work that do not depend on the number of workers. What cannot be a
document becomes a `BadDocument` with its reason, never an exception.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from megahybrid.errors import DataError

UNIT_BYTES = 8 * 2**20
MAX_DOCUMENT_BYTES = 2**30
JSON_LINES = (".jsonl", ".ndjson")
UNREAD = (".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".parquet", ".arrow")


@dataclass(frozen=True)
class Document:
    """One text; `name` says where it came from."""

    name: str
    text: str


@dataclass(frozen=True)
class BadDocument:
    """Something at byte `offset` of `file` that is no document, and the first bytes of it."""

    file: str
    offset: int
    reason: str
    beginning: bytes


@dataclass(frozen=True)
class Piece:
    """Lines of a .jsonl file that begin in [start, stop), or a whole text file."""

    path: str
    start: int
    stop: int


@dataclass(frozen=True)
class Unit:
    """What one worker does at a time."""

    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        """Size of its input."""
        return sum(piece.stop - piece.start for piece in self.pieces)


def list_files(inputs: Sequence[str | Path], pattern: str = "**/*") -> list[Path]:
    """The files that `inputs` (files, folders searched by `pattern`, globs) name, each once.

    Sorted within each input. Raises DataError when an input names nothing, or a kind not read.
    """
    found: dict[Path, None] = {}
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            files = sorted(
                entry
                for entry in path.glob(pattern)
                if entry.is_file() and not _hidden(entry.relative_to(path))
            )
        elif path.exists():
            files = [path]
        else:
            anchor = Path(path.anchor)
            relative = str(path.relative_to(anchor)) if path.anchor else str(path)
            globbed = anchor.glob(relative) if any(c in relative for c in "*?[") else ()
            files = sorted(entry for entry in globbed if entry.is_file())
        if not files:
            raise DataError(
                f"input {given} names no file (pattern {pattern}). Correct the path or --glob."
            )
        for file in files:
            if file.suffix.lower() in UNREAD:
                raise DataError(
                    f"input {file} is {file.suffix}, which this version does not read "
                    "(.jsonl and plain text are). Unpack it first."
                )
            found[file] = None
    return list(found)


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in relative.parts)


def cut_units(files: Sequence[Path], unit_bytes: int = UNIT_BYTES) -> Iterator[Unit]:
    """Units of about `unit_bytes`: ranges of long .jsonl files, groups of small files."""
    group: list[Piece] = []
    size = 0
    for file in files:
        total = file.stat().st_size
        step = unit_bytes if file.suffix.lower() in JSON_LINES else max(total, 1)
        for start in range(0, total, step):
            piece = Piece(str(file), start, min(total, start + step))
            if group and size + piece.stop - piece.start > unit_bytes:
                yield Unit(tuple(group))
                group, size = [], 0
            group.append(piece)
            size += piece.stop - piece.start
    if group:
        yield Unit(tuple(group))


def read_unit(unit: Unit, text_field: str = "text") -> Iterator[Document | BadDocument]:
    """The documents of a unit, in order."""
    for piece in unit.pieces:
        try:
            with open(piece.path, "rb") as file:
                if Path(piece.path).suffix.lower() in JSON_LINES:
                    yield from _read_lines(file, piece, text_field)
                else:
                    yield _read_text(file, piece)
        except OSError as error:
            yield BadDocument(piece.path, piece.start, f"unreadable: {error.strerror}", b"")


def _read_text(file: BinaryIO, piece: Piece) -> Document | BadDocument:
    if piece.stop > MAX_DOCUMENT_BYTES:
        return BadDocument(piece.path, 0, "too long", file.read(80))
    return _checked(file.read().removeprefix(b"\xef\xbb\xbf"), piece.path, 0)


def _read_lines(file: BinaryIO, piece: Piece, field: str) -> Iterator[Document | BadDocument]:
    offset = piece.start
    if offset:
        # A line belongs to the piece in which its first byte lies.
        file.seek(offset - 1)
        _line(file)
        offset = file.tell()
    while offset < piece.stop:
        line, whole = _line(file)
        if not line:
            return
        raw = line.removeprefix(b"\xef\xbb\xbf") if offset == 0 else line
        if not whole:
            yield BadDocument(piece.path, offset, "too long", line[:80])
        elif raw.strip():
            yield _parse(raw.rstrip(b"\r\n"), piece.path, offset, field)
        offset = file.tell()


def _line(file: BinaryIO) -> tuple[bytes, bool]:
    """The next line, and False (with its beginning only) when it is beyond MAX_DOCUMENT_BYTES."""
    line = file.readline(MAX_DOCUMENT_BYTES)
    if len(line) < MAX_DOCUMENT_BYTES or line.endswith(b"\n"):
        return line, True
    rest = line
    while rest and not rest.endswith(b"\n"):
        rest = file.readline(2**20)
    return line[:80], False


def _parse(line: bytes, file: str, offset: int, field: str) -> Document | BadDocument:
    try:
        value: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return BadDocument(file, offset, "broken utf-8", line[:80])
    except (ValueError, RecursionError):
        return BadDocument(file, offset, "broken json", line[:80])
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        return BadDocument(file, offset, f"no text field '{field}'", line[:80])
    try:
        found = _checked(value[field].encode("utf-8"), file, offset)
    except UnicodeEncodeError:
        return BadDocument(file, offset, "lone surrogate", line[:80])
    if isinstance(found, BadDocument):
        return replace(found, beginning=line[:80])
    return found


def _checked(raw: bytes, file: str, offset: int) -> Document | BadDocument:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return BadDocument(file, offset, "broken utf-8", raw[:80])
    if "\0" in text:
        return BadDocument(file, offset, "NUL character", raw[:80])
    if not text.strip():
        return BadDocument(file, offset, "empty", raw[:80])
    return Document(f"{file}:{offset}", text)
