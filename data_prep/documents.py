"""Reading documents: .jsonl (one a line), .parquet (one a row), any other text (one a file).

Text and .jsonl may be packed as .gz or .zst, and all of them may lie in a .tar or .zip; `hf:NAME`
is a Hugging Face dataset. What cannot be a document becomes a `BadDocument` with its reason, never
an exception.
"""

import codecs
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from data_prep import hub, tables
from data_prep.archives import Member, Truncated, is_archive, members
from data_prep.compressed import kind_of, open_stretch, scan
from data_prep.inputs import Fields, Piece, Unit, format_of
from data_prep.long_line import MARK, parse_long, pieces_of

MAX_LINE_BYTES = 2**28  # of .jsonl and .parquet; text files are streamed and have no limit
LONG_BYTES = 4 * 2**20  # a text file or line from this size on is a LongDocument
CHUNK_BYTES = 2**20
TEXT = Fields()
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Document:
    """One text; `name` says where it came from: file:byte (file:row in .parquet), `note` what is
    kept of its row."""

    name: str
    text: str
    note: bytes = b""


@dataclass(frozen=True)
class LongDocument:
    """A text too long to hold: its pieces in order. They raise BadText where it is no text."""

    name: str
    pieces: Iterator[str]
    note: bytes = b""


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


Item = Document | LongDocument | BadDocument


def read_unit(unit: Unit, fields: Fields = TEXT) -> Iterator[Item]:
    """The documents of a unit, in order. A LongDocument's pieces are to be used before the next."""
    for piece in unit.pieces:
        try:
            if hub.is_hub(piece.path):
                rows = hub.read_shard(piece.path, piece.start, fields.text)
                yield from _read_rows(f"{piece.path}#{piece.start}", rows, fields)
            elif is_archive(piece.path):
                yield from _read_archive(piece, fields)
            elif kind_of(piece.path):
                yield from _read_packed(piece.path, piece.path, fields)
            elif format_of(piece.path) == "parquet":
                rows = tables.read_rows(
                    piece.path, piece.start, piece.stop, fields.text, fields.kept
                )
                yield from _read_rows(piece.path, rows, fields)
            else:
                with open(piece.path, "rb") as file:
                    if format_of(piece.path) == "jsonl":
                        yield from _read_lines(file, piece, fields)
                    else:
                        yield _read_text(file, piece.path, piece.size)
        except OSError as error:
            reason = f"unreadable: {error.strerror or error}"
            yield BadDocument(piece.path, piece.start, reason, b"")


def _read_archive(piece: Piece, fields: Fields) -> Iterator[Item]:
    for member in members(piece.path, piece.start, piece.stop):
        name = f"{piece.path}!{member.name}" if member.name else piece.path
        if member.problem:
            yield BadDocument(name, member.offset, member.problem, b"")
            continue
        try:
            yield from _read_member(member, name, fields)
        except Truncated as error:
            yield BadDocument(name, 0, str(error), b"")


def _read_member(member: Member, name: str, fields: Fields) -> Iterator[Item]:
    form, packed = format_of(member.name), kind_of(member.name)
    if is_archive(member.name):
        yield BadDocument(name, 0, "archive within an archive", b"")
    elif packed or form == "parquet":
        # These are read twice or out of order, for which an archive has no second pass.
        if member.size > MAX_LINE_BYTES:
            yield BadDocument(name, 0, "packed member too long", b"")
            return
        content = member.file.read()
        if packed:
            yield from _read_packed(member.name, name, fields, content)
        else:
            rows = tables.read_rows(io.BytesIO(content), 0, 2**62, fields.text, fields.kept)
            yield from _read_rows(name, rows, fields)
    elif form == "jsonl":
        yield from _stream_lines(member.file, name, 0, fields, True)
    else:
        yield _read_text(member.file, name, member.size)


def _read_packed(
    path: str, name: str, fields: Fields, content: bytes | None = None
) -> Iterator[Item]:
    """A .gz or .zst; `content` where it is a member of an archive, called `name` in all."""
    if format_of(path) == "parquet":
        yield BadDocument(name, 0, "packed parquet", b"")
        return
    stretches = scan(path, content)
    if format_of(path) == "text":
        problems = [stretch.problem for stretch in stretches if stretch.problem]
        if problems:
            yield BadDocument(name, stretches[0].bytes, problems[0], b"")
        for stretch in stretches if not problems else ():
            with open_stretch(path, stretch, content) as file:
                yield _read_text(file, name, stretch.bytes)
        return
    for stretch in stretches:
        with open_stretch(path, stretch, content) as file:
            whole = not stretch.problem.startswith("truncated")
            yield from _stream_lines(file, name, stretch.offset, fields, whole)
        if stretch.problem:
            yield BadDocument(name, stretch.offset + stretch.bytes, stretch.problem, b"")


def _stream_lines(
    file: BinaryIO, path: str, offset: int, fields: Fields, whole: bool
) -> Iterator[Item]:
    """Lines of a file read forwards; whole=False: what follows the last newline is not used."""
    while True:
        line, size = _line(file)
        if not line or (not whole and len(line) == size and not line.endswith(b"\n")):
            return
        yield from _document_of_line(line, size, path, offset, fields)
        offset += size


def _read_lines(file: BinaryIO, piece: Piece, fields: Fields) -> Iterator[Item]:
    offset = piece.start
    if offset:
        # A line belongs to the piece in which its first byte lies.
        file.seek(offset - 1)
        offset += _line(file)[1] - 1
    while offset < piece.stop:
        line, size = _line(file)
        if not line:
            return
        yield from _document_of_line(line, size, piece.path, offset, fields)
        offset += size


def _document_of_line(
    line: bytes, size: int, path: str, offset: int, fields: Fields
) -> Iterator[Item]:
    if LONG_BYTES <= len(line) == size:
        yield _parse_long(line, path, offset, fields)
        return
    raw = line.removeprefix(BOM) if offset == 0 else line
    if len(line) < size:
        yield BadDocument(path, offset, "line too long", line[:80])
    elif raw.strip(b" \t\r\n"):
        yield _parse(raw.rstrip(b"\r\n"), path, offset, fields)


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


def _parse_long(line: bytes, file: str, offset: int, fields: Fields) -> Item:
    """As `_parse`, without a second copy of the text."""
    try:
        value, long = parse_long(line.removeprefix(BOM) if offset == 0 else line)
    except UnicodeDecodeError:
        return BadDocument(file, offset, "broken utf-8", line[:80])
    except (ValueError, RecursionError):
        return BadDocument(file, offset, "broken json", line[:80])
    text = value.get(fields.text) if isinstance(value, dict) else None
    if not isinstance(text, str):
        return BadDocument(file, offset, f"no text field '{fields.text}'", line[:80])
    if not text.startswith(MARK):
        return _of_row(checked(text, file, offset), line, value, fields)
    start, stop = long[int(text.removeprefix(MARK))]
    short = {k: v for k, v in value.items() if not (isinstance(v, str) and v.startswith(MARK))}
    return LongDocument(f"{file}:{offset}", _long_pieces(line, start, stop), fields.note(short))


def _of_row(
    found: Document | BadDocument, line: bytes, row: dict[str, Any], fields: Fields
) -> Document | BadDocument:
    if isinstance(found, BadDocument):
        return replace(found, beginning=line[:80])
    return replace(found, note=fields.note(row)) if fields.kept else found


def _long_pieces(line: bytes, start: int, stop: int) -> Iterator[str]:
    blank = True
    try:
        for text in pieces_of(line, start, stop):
            if "\0" in text:
                raise BadText("NUL character")
            blank = blank and text.isspace()
            yield text
    except UnicodeDecodeError:
        raise BadText("broken utf-8") from None
    except ValueError:
        raise BadText("broken json") from None
    if blank:
        raise BadText("empty")


def _parse(line: bytes, file: str, offset: int, fields: Fields) -> Document | BadDocument:
    try:
        value: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return BadDocument(file, offset, "broken utf-8", line[:80])
    except (ValueError, RecursionError):
        return BadDocument(file, offset, "broken json", line[:80])
    if not isinstance(value, dict) or not isinstance(value.get(fields.text), str):
        return BadDocument(file, offset, f"no text field '{fields.text}'", line[:80])
    return _of_row(checked(value[fields.text], file, offset), line, value, fields)


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


def _read_rows(path: str, rows: Iterator[tables.Row], fields: Fields) -> Iterator[Item]:
    for row, text, more in rows:
        if isinstance(text, tables.BadRow):
            yield BadDocument(path, row, text.reason, b"")
        elif len(text) > MAX_LINE_BYTES:
            yield BadDocument(path, row, "line too long", b"")
        else:
            found = checked(text, path, row)
            if fields.kept and isinstance(found, Document):
                found = replace(found, note=fields.note(more))
            yield found


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
    while True:
        try:
            raw = file.read(CHUNK_BYTES)
            text = decode.decode(raw)
        except UnicodeDecodeError:
            raise BadText("broken utf-8") from None
        except Truncated as error:
            raise BadText(str(error)) from None
        if not raw:
            break
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
