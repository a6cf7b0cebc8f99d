"""Reading documents: JSON (one a line or array element), .parquet (one a row), text files.

Text and JSON may be packed as .gz or .zst, and all of them may lie in a .tar or .zip; `hf:NAME` is
a Hugging Face dataset. What cannot be a document becomes a `BadDocument` with its reason and the
bytes that are lost with it, never an exception.
"""

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import BinaryIO, assert_never

from megahybrid.data_prep import hub, tables
from megahybrid.data_prep.archives import Member, Truncated, is_archive, tar_members, zip_members
from megahybrid.data_prep.compressed import open_stretch, scan
from megahybrid.data_prep.inputs import InputRange, Unit
from megahybrid.data_prep.items import (
    BadDocument,
    BadText,
    Document,
    Fields,
    Item,
    LongDocument,
    Origin,
    checked,
)
from megahybrid.data_prep.json_array import ArrayReader
from megahybrid.data_prep.plain_text import (
    MAX_LINE_BYTES,
    document_of_line,
    read_lines,
    read_text,
    stream_lines,
    unreadable,
)
from megahybrid.data_prep.sniff import (
    LOOKS,
    Format,
    NotText,
    detect_format,
    guess_format,
    packing_of_file,
)

__all__ = ["BadDocument", "BadText", "Document", "Item", "LongDocument", "read_unit"]

TEXT = Fields()


def read_unit(unit: Unit, fields: Fields = TEXT) -> Iterator[Item]:
    """The documents of a unit, in order. A LongDocument's pieces are to be used before the next."""
    for part in unit.ranges:
        known = _Known()
        try:
            yield from known.of(_read_part(part, fields))
        except OSError as error:
            rest = max(0.0, part.size - known.size)
            yield BadDocument(part.shown, part.start, unreadable(error), b"", rest)


class _Known:
    """Sums up the bytes on disk that are accounted for: the rest is lost where reading fails."""

    def __init__(self) -> None:
        self.size = 0.0

    def of(self, items: Iterable[Item]) -> Iterator[Item]:
        for item in items:
            self.size += item.size
            yield item


def _read_part(part: InputRange, fields: Fields) -> Iterator[Item]:
    kind, packed = part.format.kind, part.format.packed
    origin = Origin(part.shown, fields, strings=kind == "strings")
    if kind == "hub":
        rows = hub.read_shard(part.path, part.start, fields)
        yield from _read_rows(replace(origin, file=f"{part.shown}#{part.start}"), rows)
    elif kind == "zip" and not packed:
        yield from _read_archive(zip_members(part.path, part.start, part.stop), origin)
    elif kind == "tar":
        yield from _read_archive(tar_members(part.path, packed), origin)
    elif packed:
        yield from _read_packed(part.path, part.format, origin, part.size)
    elif kind == "parquet":
        rows = tables.read_rows(part.path, part.start, part.stop, part.size, fields)
        yield from _read_rows(origin, rows)
    else:
        with open(part.path, "rb") as file:
            if kind in ("jsonl", "strings"):
                yield from read_lines(file, part.start, part.stop, origin)
            else:
                yield from _read_forwards(file, part.format, origin, part.size)


def _read_archive(archive: Iterator[Member], origin: Origin) -> Iterator[Item]:
    for member in archive:
        name = f"{origin.file}!{member.name}" if member.name else origin.file
        if member.problem:
            yield BadDocument(
                name, member.offset, member.problem, b"", member.packed, member.absent
            )
            continue
        known = _Known()
        try:
            yield from known.of(_read_member(member, name, origin.fields))
        except Truncated as error:
            # What it lacks and others have is lost with those.
            rest = member.packed - known.size - (error.left - error.absent)
            yield BadDocument(name, 0, str(error), b"", max(error.absent, rest), error.absent)


def _read_member(member: Member, name: str, fields: Fields) -> Iterator[Item]:
    head = member.file.peek(LOOKS[1])
    origin = Origin(name, fields, member.rate)
    found: Format | NotText | None
    if is_archive(member.name):
        found = Format("tar")
    elif packing_of_file(head, member.name):
        found = Format("text", "gzip")
    else:
        found = guess_format(
            head, len(head) >= member.size, member.name, fields.text, fields.format
        )
    assert found is not None
    if isinstance(found, Format) and (found.packed or found.kind == "parquet"):
        # These are read twice or out of order, for which an archive has no second pass.
        if member.size > MAX_LINE_BYTES:
            yield BadDocument(name, 0, "packed member too long", b"", member.packed)
            return
        content = member.file.read()
        if found.kind == "parquet":
            held = io.BytesIO(content)
            rows = tables.read_rows(held, 0, 2**62, member.packed, fields)
            yield from _read_rows(origin, rows)
            return
        found = detect_format(io.BytesIO(content), member.name, fields.text, fields.format)
        if isinstance(found, Format):
            yield from _read_packed(member.name, found, origin, len(content), content)
            return
    if isinstance(found, NotText):
        yield BadDocument(name, 0, found.why, b"", member.packed)
    else:
        yield from _read_forwards(member.file, found, origin, member.size)


def _read_packed(
    path: str, form: Format, origin: Origin, size: int, content: bytes | None = None
) -> Iterator[Item]:
    """A packed file of `size` bytes; `content` where it is a member of an archive."""
    if form.kind in ("parquet", "tar", "zip") or form.packed is None:
        yield from _read_forwards(io.BytesIO(), form, origin, size)
        return
    stretches = scan(path, form.packed, content)
    problems = [stretch.problem for stretch in stretches if stretch.problem]
    if form.kind == "text" and problems:
        absent = sum(stretch.absent for stretch in stretches) * origin.rate
        lost = size * origin.rate + absent
        yield BadDocument(origin.file, stretches[0].bytes, problems[0], b"", lost, absent)
        return
    for stretch in stretches:
        inside = replace(origin, rate=origin.rate * stretch.rate)
        unused = 0
        with open_stretch(path, form.packed, stretch, content) as file:
            if form.kind in ("jsonl", "strings"):
                whole = not stretch.problem.startswith("truncated")
                inside = replace(inside, strings=form.kind == "strings")
                unused = yield from stream_lines(file, inside, stretch.offset, whole)
            elif stretch.bytes:
                yield from _read_forwards(file, form, inside, stretch.bytes)
        if stretch.problem:
            absent = stretch.absent * origin.rate
            lost = unused * inside.rate + stretch.lost * origin.rate + absent
            place = stretch.offset + stretch.bytes
            yield BadDocument(origin.file, place, stretch.problem, b"", lost, absent)


def _read_forwards(file: BinaryIO, form: Format, origin: Origin, size: int) -> Iterator[Item]:
    """A file of `size` bytes that may be no more than read forwards, once."""
    origin = replace(origin, strings=form.kind == "strings")
    match form.kind:
        case "text" if origin.fields.chat:
            yield origin.bad(0, "text, not a list of conversations", b"", size)
        case "text":
            yield read_text(file, origin, size)
        case "jsonl" | "strings":
            yield from stream_lines(file, origin, 0)
        case "json":
            yield from _read_array(file, origin)
        case "parquet":
            yield origin.bad(0, "packed parquet", b"", size)
        case "tar" | "zip":
            yield origin.bad(0, "archive within an archive", b"", size)
        case "hub":
            raise AssertionError("a hub dataset is no file")
        case _:
            assert_never(form.kind)


def _read_array(file: BinaryIO, origin: Origin) -> Iterator[Item]:
    reader = ArrayReader(file, MAX_LINE_BYTES)
    while (element := reader.next()) is not None:
        if not element.problem:
            inside = replace(origin, strings=reader.of_strings)
            (item,) = document_of_line(element.raw, element.size, element.offset, inside)
            if not isinstance(item, BadDocument) or _is_json(element.raw):
                reader.learn(element)
                yield item
                continue
            # Its end may be another's.
            element = reader.skip_broken(element, item.reason)
        yield origin.bad(element.offset, element.problem, element.raw[:80], element.size)


def _is_json(raw: bytes) -> bool:
    try:
        json.loads(raw.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return False
    return True


def _read_rows(origin: Origin, rows: Iterator[tables.Row]) -> Iterator[Item]:
    path, fields = origin.file, origin.fields
    each = replace(origin, rate=1.0)
    for row, text, more, size in rows:
        if isinstance(text, tables.BadRow):
            yield BadDocument(path, row, text.reason, b"", size)
        elif len(text) > MAX_LINE_BYTES:
            yield BadDocument(path, row, "line too long", b"", size)
        else:
            found = checked(text, each, row, size)
            if fields.kept and isinstance(found, Document):
                found = replace(found, metadata=fields.metadata(more))
            yield found
