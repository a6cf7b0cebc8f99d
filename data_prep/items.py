"""The items that reading gives: documents and bad ones, each with the bytes on disk it took up."""

import codecs
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megahybrid.data.chat.conversation import TOOLS, conversation_text
from megahybrid.data_prep.kept_fields import metadata_line

EMPTY = "empty"
BOM = codecs.BOM_UTF8
WIDE_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


@dataclass(frozen=True)
class Document:
    """One text.

    `name` says where it came from: file:byte (file:row in .parquet). `metadata` is what is kept of
    its row. `size`: bytes on disk that it takes up (of a hub dataset: rows).
    """

    name: str
    text: str
    metadata: bytes = b""
    size: float = 0.0


@dataclass(frozen=True)
class LongDocument:
    """A text too long to hold: its pieces in order. They raise BadText where it is no text."""

    name: str
    pieces: Iterator[str]
    metadata: bytes = b""
    size: float = 0.0


@dataclass(frozen=True)
class BadDocument:
    """Something at byte `offset` of `file` that is no document, and the first bytes of it.

    In a packed file the offset is that of the unpacked text, in .parquet the number of the row.
    `size`: bytes on disk that are lost with it (of a hub dataset: rows), all that a broken member
    or row group held; of these `absent` are named by a header but not there any more.
    """

    file: str
    offset: int
    reason: str
    beginning: bytes
    size: float = 0.0
    absent: float = 0.0


class BadText(Exception):
    """Text that cannot be used; the message is the reason. absent: as in BadDocument."""

    def __init__(self, reason: str, absent: float = 0.0) -> None:
        super().__init__(reason)
        self.absent = absent


Item = Document | LongDocument | BadDocument


@dataclass(frozen=True)
class Fields:
    """The fields that are read of a row: the text's, and those that are kept beside the tokens.

    `found` counts the rows that had each of the kept ones. `format` is "auto", or how every file
    is read. chat: the text's field holds messages, and the document is their JSON.
    """

    text: str = "text"
    kept: tuple[str, ...] = ()
    found: Counter[str] = field(default_factory=Counter)
    format: str = "auto"
    chat: bool = False

    def value(self, row: Mapping[str, Any], *, sparse: bool = False) -> Any:
        """Return what a row has for the text, which is none unless it is a string.

        sparse: as `conversation_text` has it.
        """
        return conversation_text(row, self.text, sparse=sparse) if self.chat else row.get(self.text)

    @property
    def columns(self) -> list[str]:
        """The fields that are read of a table: the text's is the first."""
        return list(dict.fromkeys([self.text, *[TOOLS] * self.chat, *self.kept]))

    @property
    def missing(self) -> str:
        """The reason why a row holds no document."""
        what = "list of messages in field" if self.chat else "text field"
        return f"no {what} '{self.text}'"

    def metadata(self, row: Mapping[str, Any]) -> bytes:
        """Return the kept fields of a row as strict JSON; nothing where none are to be kept."""
        if not self.kept:
            return b""
        value = {name: row[name] for name in self.kept if name in row}
        self.found.update(value.keys())
        return metadata_line(value)


@dataclass(frozen=True)
class Origin:
    """The file that text comes from, as it is shown, and what is to be read of it.

    rate: bytes on disk for each byte of the text. strings: whether a JSON string is a document.
    """

    file: str
    fields: Fields
    rate: float = 1.0
    strings: bool = False

    def bad(self, offset: int, reason: str, beginning: bytes, size: float) -> BadDocument:
        """Return a bad document that takes up `size` bytes of the text."""
        return BadDocument(self.file, offset, reason, beginning, size * self.rate)


def checked(text: str, origin: Origin, offset: int, size: float) -> Document | BadDocument:
    """The text as a document, unless it is none; `size`: bytes of its row, as the text has them."""
    reason = ""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            reason = "lone surrogate"
    if "\0" in text:
        reason = reason or "NUL character"
    elif not text or text.isspace():
        reason = reason or EMPTY
    if reason:
        beginning = text[:80].encode("utf-8", "surrogatepass")
        return origin.bad(offset, reason, beginning, size)
    return Document(f"{origin.file}:{offset}", text, size=size * origin.rate)
