"""Reading documents: .jsonl (one a line), .parquet (one a row), any other text (one a file).

Text and .jsonl may be packed as .gz or .zst; `hf:NAME` is a Hugging Face dataset. Inputs are cut
into units of work that do not depend on the number of workers. What cannot be a document becomes a
`BadDocument` with its reason, never an exception.
"""

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from data_prep import hub, tables
from data_prep.compressed import kind_of, open_stretch, scan
from megahybrid.errors import DataError

UNIT_BYTES = 8 * 2**20
MOST_UNITS = 100_000  # beyond it units grow: each is a handful of files
MAX_LINE_BYTES = 2**28  # of .jsonl and .parquet; text files are streamed and have no limit
LONG_BYTES = 4 * 2**20  # a text file from this size on is a LongDocument
CHUNK_BYTES = 2**20
JSON_LINES = (".jsonl", ".ndjson")
UNREAD = (".xz", ".bz2", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".arrow", ".feather", ".orc")
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Document:
    """One text; `name` says where it came from: file:byte (file:row in .parquet)."""

    name: str
    text: str


@dataclass(frozen=True)
class LongDocument:
    """A text too long to hold: its pieces in order. They raise BadText where it is no text."""

    name: str
    pieces: Iterator[str]


@dataclass(frozen=True)
class BadDocument:
    """Something at byte `offset` of `file` that is no document, and the first bytes of it.

    In a packed file the offset is that of the unpacked text, in .parquet the number of the row.
    """

    file: str
    offset: int
    reason: str
    beginning: bytes


class BadText(Exception):
    """Text that cannot be used; the message is the reason."""


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


Item = Document | LongDocument | BadDocument


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
                    ".gz or .zst, and .parquet are). Unpack it first, or narrow --glob."
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


def _format(path: str | Path) -> str:
    """jsonl, parquet or text, whatever it is packed in."""
    name = Path(path)
    suffix = (Path(name.stem) if kind_of(name) else name).suffix.lower()
    return {".parquet": "parquet"}.get(suffix, "jsonl" if suffix in JSON_LINES else "text")


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
    if kind_of(file) is None and _format(file) == "parquet":
        for start, stop, size in tables.row_group_ranges(file, unit_bytes):
            yield Piece(str(file), start, stop, size)
        return
    step = unit_bytes if kind_of(file) is None and _format(file) == "jsonl" else max(total, 1)
    for start in range(0, total, step):
        stop = min(total, start + step)
        yield Piece(str(file), start, stop, stop - start)


def read_unit(unit: Unit, text_field: str = "text") -> Iterator[Item]:
    """The documents of a unit, in order. A LongDocument's pieces are to be used before the next."""
    for piece in unit.pieces:
        try:
            if hub.is_hub(piece.path):
                rows = hub.read_shard(piece.path, piece.start, text_field)
                yield from _read_rows(f"{piece.path}#{piece.start}", rows)
            elif kind_of(piece.path):
                yield from _read_packed(piece, text_field)
            elif _format(piece.path) == "parquet":
                rows = tables.read_rows(piece.path, piece.start, piece.stop, text_field)
                yield from _read_rows(piece.path, rows)
            else:
                with open(piece.path, "rb") as file:
                    if _format(piece.path) == "jsonl":
                        yield from _read_lines(file, piece, text_field)
                    else:
                        yield _read_text(file, piece.path, piece.size)
        except OSError as error:
            reason = f"unreadable: {error.strerror or error}"
            yield BadDocument(piece.path, piece.start, reason, b"")


def _read_packed(piece: Piece, field: str) -> Iterator[Item]:
    if _format(piece.path) == "parquet":
        yield BadDocument(piece.path, 0, "packed parquet", b"")
        return
    stretches = scan(piece.path)
    if _format(piece.path) == "text":
        problems = [stretch.problem for stretch in stretches if stretch.problem]
        if problems:
            yield BadDocument(piece.path, stretches[0].bytes, problems[0], b"")
        for stretch in stretches if not problems else ():
            with open_stretch(piece.path, stretch) as file:
                yield _read_text(file, piece.path, stretch.bytes)
        return
    for stretch in stretches:
        with open_stretch(piece.path, stretch) as file:
            whole = not stretch.problem.startswith("truncated")
            yield from _stream_lines(file, piece.path, stretch.offset, field, whole)
        if stretch.problem:
            yield BadDocument(piece.path, stretch.offset + stretch.bytes, stretch.problem, b"")


def _stream_lines(
    file: BinaryIO, path: str, offset: int, field: str, whole: bool
) -> Iterator[Item]:
    """Lines of a file read forwards; whole=False: what follows the last newline is not used."""
    while True:
        line, size = _line(file)
        if not line or (not whole and len(line) == size and not line.endswith(b"\n")):
            return
        yield from _document_of_line(line, size, path, offset, field)
        offset += size


def _read_lines(file: BinaryIO, piece: Piece, field: str) -> Iterator[Item]:
    offset = piece.start
    if offset:
        # A line belongs to the piece in which its first byte lies.
        file.seek(offset - 1)
        offset += _line(file)[1] - 1
    while offset < piece.stop:
        line, size = _line(file)
        if not line:
            return
        yield from _document_of_line(line, size, piece.path, offset, field)
        offset += size


def _document_of_line(
    line: bytes, size: int, path: str, offset: int, field: str
) -> Iterator[Document | BadDocument]:
    raw = line.removeprefix(BOM) if offset == 0 else line
    if len(line) < size:
        yield BadDocument(path, offset, "line too long", line[:80])
    elif raw.strip(b" \t\r\n"):
        yield _parse(raw.rstrip(b"\r\n"), path, offset, field)


def _line(file: BinaryIO) -> tuple[bytes, int]:
    """The next line and its size; beyond MAX_LINE_BYTES only its beginning is kept."""
    line = file.readline(MAX_LINE_BYTES)
    if len(line) < MAX_LINE_BYTES or line.endswith(b"\n"):
        return line, len(line)
    beginning, size = line[:80], len(line)
    del line
    while rest := file.readline(2**20):
        size += len(rest)
        if rest.endswith(b"\n"):
            break
    return beginning, size


def _parse(line: bytes, file: str, offset: int, field: str) -> Document | BadDocument:
    try:
        value: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return BadDocument(file, offset, "broken utf-8", line[:80])
    except (ValueError, RecursionError):
        return BadDocument(file, offset, "broken json", line[:80])
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        return BadDocument(file, offset, f"no text field '{field}'", line[:80])
    found = checked(value[field], file, offset)
    return replace(found, beginning=line[:80]) if isinstance(found, BadDocument) else found


def checked(text: str, file: str, offset: int) -> Document | BadDocument:
    """The text as a document, unless it is none."""
    reason = ""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            reason = "lone surrogate"
    if "\0" in text:
        reason = reason or "NUL character"
    elif not text or text.isspace():
        reason = reason or "empty"
    if reason:
        return BadDocument(file, offset, reason, text[:80].encode("utf-8", "surrogatepass"))
    return Document(f"{file}:{offset}", text)


def _read_rows(path: str, rows: Iterator[tuple[int, str | tables.BadRow]]) -> Iterator[Item]:
    for row, text in rows:
        if isinstance(text, tables.BadRow):
            yield BadDocument(path, row, text.reason, b"")
        elif len(text) > MAX_LINE_BYTES:
            yield BadDocument(path, row, "line too long", text[:80].encode())
        else:
            yield checked(text, path, row)


def _read_text(file: BinaryIO, path: str, size: int) -> Item:
    if size >= LONG_BYTES:
        return LongDocument(f"{path}:0", _text_pieces(file))
    raw = file.read().removeprefix(BOM)
    try:
        return checked(raw.decode("utf-8"), path, 0)
    except UnicodeDecodeError as error:
        return BadDocument(path, error.start, "broken utf-8", raw[error.start :][:80])


def _text_pieces(file: BinaryIO) -> Iterator[str]:
    decode = codecs.getincrementaldecoder("utf-8-sig")()
    blank = True
    for raw in iter(lambda: file.read(CHUNK_BYTES), b""):
        try:
            text = decode.decode(raw)
        except UnicodeDecodeError:
            raise BadText("broken utf-8") from None
        if "\0" in text:
            raise BadText("NUL character")
        blank = blank and (not text or text.isspace())
        yield text
    try:
        decode.decode(b"", True)
    except UnicodeDecodeError:
        raise BadText("broken utf-8") from None
    if blank:
        raise BadText("empty")
