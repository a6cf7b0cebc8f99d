"""Plain text: JSON of one document a line, or one text a file."""

import codecs
import json
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any, BinaryIO

from megahybrid.data_prep.archives import Truncated
from megahybrid.data_prep.items import (
    BOM,
    EMPTY,
    WIDE_BOMS,
    BadDocument,
    BadText,
    Document,
    Item,
    LongDocument,
    Origin,
    checked,
)
from megahybrid.data_prep.long_line import MARK, parse_long, pieces_of

MAX_LINE_BYTES = 2**28  # of lines, elements of an array and rows; texts are streamed without limit
LONG_BYTES = 4 * 2**20  # a text file or line from this size on is a LongDocument
CHUNK_BYTES = 2**20
CHANGED = "changed while it was read"


def stream_lines(
    file: BinaryIO, origin: Origin, offset: int, whole: bool = True
) -> Generator[Item, None, int]:
    """Lines of a file read forwards; whole=False: what follows the last newline is not used.

    Returns how many bytes were not used.
    """
    while True:
        line, size = _line(file)
        if not line:
            return 0
        if not whole and len(line) == size and not line.endswith(b"\n"):
            return size
        yield from document_of_line(line, size, offset, origin)
        offset += size


def read_lines(file: BinaryIO, start: int, stop: int, origin: Origin) -> Iterator[Item]:
    """The lines that begin in [start, stop), of a file that can be entered anywhere."""
    offset = start
    if offset:
        # A line belongs to the piece in which its first byte lies.
        file.seek(offset - 1)
        offset += max(0, _line(file)[1] - 1)
    while offset < stop:
        line, size = _line(file)
        if not line:
            yield origin.bad(offset, CHANGED, b"", stop - offset)
            return
        yield from document_of_line(line, size, offset, origin)
        offset += size


def document_of_line(line: bytes, size: int, offset: int, origin: Origin) -> Iterator[Item]:
    """Yield the document that a line of `size` bytes holds; a blank line holds none.

    `line` may be no more than the beginning of it.
    """
    if LONG_BYTES <= len(line) == size and not origin.fields.chat:
        yield _parse_long(line, offset, origin)
        return
    raw = line.removeprefix(BOM) if offset == 0 else line
    if len(line) < size:
        yield origin.bad(offset, "line too long", line[:80], size)
    elif raw.strip(b" \t\r\n"):
        yield _parse(raw.rstrip(b"\r\n"), offset, origin, size)


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


def _parse_long(line: bytes, offset: int, origin: Origin) -> Item:
    """Parse a line as `_parse` does, without a second copy of the text."""
    size = len(line)
    try:
        value, long = parse_long(line.removeprefix(BOM) if offset == 0 else line)
    except (ValueError, RecursionError) as error:
        return origin.bad(offset, _broken(error), line[:80], size)
    text, row = _text_and_row(value, origin)
    if not isinstance(text, str):
        return origin.bad(offset, f"no text field '{origin.fields.text}'", line[:80], size)
    if not text.startswith(MARK):
        return _of_row(checked(text, origin, offset, size), line, row, origin)
    start, stop = long[int(text.removeprefix(MARK))]
    short = {k: v for k, v in row.items() if not (isinstance(v, str) and v.startswith(MARK))}
    return LongDocument(
        f"{origin.file}:{offset}",
        _long_pieces(line, start, stop),
        origin.fields.metadata(short),
        size * origin.rate,
    )


def _broken(error: Exception) -> str:
    return "broken utf-8" if isinstance(error, UnicodeDecodeError) else "broken json"


def _text_and_row(value: Any, origin: Origin) -> tuple[Any, dict[str, Any]]:
    if isinstance(value, dict):
        return origin.fields.value(value), value
    return (value if origin.strings and not origin.fields.chat else None), {}


def _of_row(
    found: Document | BadDocument, line: bytes, row: dict[str, Any], origin: Origin
) -> Document | BadDocument:
    if isinstance(found, BadDocument):
        return replace(found, beginning=line[:80])
    return replace(found, metadata=origin.fields.metadata(row)) if origin.fields.kept else found


def _long_pieces(line: bytes, start: int, stop: int) -> Iterator[str]:
    blank = True
    try:
        for text in pieces_of(line, start, stop):
            if "\0" in text:
                raise BadText("NUL character")
            blank = blank and text.isspace()
            yield text
    except ValueError as error:
        raise BadText(_broken(error)) from None
    if blank:
        raise BadText(EMPTY)


def _parse(line: bytes, offset: int, origin: Origin, size: int) -> Document | BadDocument:
    try:
        value: Any = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return origin.bad(offset, _broken(error), line[:80], size)
    text, row = _text_and_row(value, origin)
    if not isinstance(text, str):
        return origin.bad(offset, origin.fields.missing, line[:80], size)
    return _of_row(checked(text, origin, offset, size), line, row, origin)


def read_text(file: BinaryIO, origin: Origin, size: int) -> Item:
    """A file of `size` bytes as one text."""
    if size >= LONG_BYTES:
        return LongDocument(f"{origin.file}:0", _text_pieces(file, size), size=size * origin.rate)
    raw = file.read()
    if len(raw) < size:
        return origin.bad(0, CHANGED, raw[:80], size)
    if raw.startswith(WIDE_BOMS):
        return origin.bad(0, "utf-16, not utf-8", raw[:80], size)
    raw = raw.removeprefix(BOM)
    try:
        return checked(raw.decode("utf-8"), origin, 0, size)
    except UnicodeDecodeError as error:
        return origin.bad(error.start, "broken utf-8", raw[error.start :][:80], size)


def _text_pieces(file: BinaryIO, size: int) -> Iterator[str]:
    decode = codecs.getincrementaldecoder("utf-8-sig")()
    blank, done = True, 0
    while True:
        try:
            raw = file.read(CHUNK_BYTES)
            text = decode.decode(raw)
        except UnicodeDecodeError:
            wide = not done and raw.startswith(WIDE_BOMS)
            raise BadText("utf-16, not utf-8" if wide else "broken utf-8") from None
        except Truncated as error:
            raise BadText(str(error), error.absent) from None
        except OSError as error:
            raise BadText(unreadable(error)) from None
        if not raw:
            break
        if "\0" in text:
            raise BadText("NUL character")
        blank = blank and (not text or text.isspace())
        done += len(raw)
        yield text
    if done < size:
        raise BadText(CHANGED)
    try:
        decode.decode(b"", True)
    except UnicodeDecodeError:
        raise BadText("broken utf-8") from None
    if blank:
        raise BadText(EMPTY)


def unreadable(error: OSError) -> str:
    """Return the reason why a file gives nothing more."""
    return f"unreadable: {error.strerror or error}"
