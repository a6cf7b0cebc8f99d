"""The format of a file, by its first bytes; by its name only where they cannot tell.

Text of any suffix is taken. JSON is taken where it is a list of documents: lines, or one array.
"""

import csv
import json
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from megahybrid.data_prep.compressed import (
    Packing,
    beginning_of,
    packing_by_content,
    packing_by_name,
)
from megahybrid.data_prep.items import BOM, WIDE_BOMS

Kind = Literal["text", "jsonl", "strings", "json", "parquet", "tar", "zip", "hub"]
FORMATS = ("auto", "text", "jsonl", "json", "parquet")  # what may be asked for
LOOKS = (2**16, 2**20, 2**24)  # bytes; more where a first line goes on beyond
LINES = 100  # of a beginning, that are parsed
JSON_LINES = (".jsonl", ".ndjson")
JSON_NAMES = (*JSON_LINES, ".json")
MOST_CONTROLS = 0.02  # of the bytes of a text; a tenth of random bytes are control characters
CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r\b\x1b")) + b"\x7f"
NO_LIST = "JSON that is not a list of documents"
MAGIC = {
    b"\x89PNG": "image",
    b"\xff\xd8\xff": "image",
    b"GIF8": "image",
    b"II*\0": "image",
    b"MM\0*": "image",
    b"\0\0\1\0": "image",
    b"%PDF": "PDF",
    b"PK\3\4": "zip container",
    b"\x7fELF": "program",
    b"MZ": "program",
    b"SQLite format 3\0": "database",
    b"BM": "image",
    b"\x89HDF": "table",
    b"ARROW1": "table",
    b"ORC": "table",
    b"\x93NUMPY": "table",
    b"\xfd7zXZ\0": "xz, which is not read",
    b"BZh": "bzip2, which is not read",
    b"7z\xbc\xaf": "7z, which is not read",
    b"\x04\x22\x4d\x18": "lz4, which is not read",
    b"Rar!": "rar, which is not read",
}
TABLES = (".csv", ".tsv", ".psv")
_NUMBER = re.compile(r"\s*[-+]?\d[\d.]*([eE][-+]?\d+)?\s*")
_HEX = r"([0-9a-fA-F]{32}|[0-9a-fA-F]{40}|[0-9a-fA-F]{56,64}|[0-9a-fA-F]{96,128})"
_DIGEST = re.compile(rf"\\?{_HEX}([ \t]+[*]?\S.*)?\s*|[\w/-]+ ?\(.+\) ?= ?{_HEX}\s*")


@dataclass(frozen=True)
class Format:
    """The way in which a file is read: its content, and the packing around that."""

    kind: Kind
    packed: Packing | None = None

    def __str__(self) -> str:
        return f"{self.kind} in {self.packed}" if self.packed else self.kind


@dataclass(frozen=True)
class NotText:
    """The reason why a file is left out."""

    why: str


def detect_format(file: BinaryIO, name: str, field: str, asked: str = "auto") -> Format | NotText:
    """Return the format of a file that can be read again from its beginning.

    `asked` is one of FORMATS.
    """
    verdict: Format | NotText | None = None
    for size in LOOKS:
        file.seek(0)
        raw = file.read(size)
        packed = packing_of_file(raw, name)
        inside = beginning_of(file, packed, size) if packed else raw
        last = size == LOOKS[-1]
        verdict = guess_format(inside, len(inside) < size, _inner(name), field, asked, last=last)
        if verdict is not None:
            break
    assert verdict is not None
    return Format(verdict.kind, packed) if packed and isinstance(verdict, Format) else verdict


def packing_of_file(raw: bytes, name: str) -> Packing | None:
    """Return the packing of a file that begins with `raw`."""
    # Without its magic a packed file is damaged, unless somebody has unpacked it already.
    named = packing_by_name(name) if not raw or _is_binary(raw) else None
    return packing_by_content(raw) or named


def _inner(name: str) -> str:
    if packing_by_name(name) is None:
        return name
    inner = name.rpartition(".")[0]
    return f"{inner}.tar" if name.lower().endswith((".tgz", ".tzst")) else inner


def guess_format(
    raw: bytes, whole: bool, name: str, field: str, asked: str = "auto", *, last: bool = True
) -> Format | NotText | None:
    """Return the format of a text that begins with `raw`; None where more must be seen first.

    whole: `raw` is all of it. The `last` look always decides.
    """
    suffix = Path(name).suffix.lower()
    if suffix == ".tar" or _is_tar(raw):
        return Format("tar")
    if suffix == ".zip":
        return Format("zip")
    match asked:
        case "text" | "json" | "parquet":
            return Format(asked)
        case "jsonl":
            first = _first_value(raw.removeprefix(BOM))
            return Format("strings" if isinstance(first, str) else "jsonl")
    if raw.startswith(b"PAR1") or suffix == ".parquet":
        return Format("parquet")
    if raw.startswith(WIDE_BOMS) or not raw:
        return Format("jsonl" if suffix in JSON_LINES and not raw else "text")
    binary = _is_binary(raw)
    if binary and (why := _magic(raw)):
        return NotText(why)
    body = raw.removeprefix(BOM).lstrip(b" \t\r\n")
    if body[:1] in (b"{", b"[", b'"') or suffix in JSON_NAMES:
        if b"\n" not in body and not whole and not last:
            return None
        if (found := _json(body, whole, suffix, field)) is not None:
            return found
    if suffix in JSON_LINES:
        return Format("jsonl")
    if binary:
        return NotText("binary")
    if suffix == ".json":
        return NotText(NO_LIST)
    text = body.decode("utf-8", "replace")
    return NotText(why) if (why := _no_prose(text, suffix, whole)) else Format("text")


def _is_binary(raw: bytes) -> bool:
    controls = len(raw) - len(raw.translate(None, CONTROLS))
    return controls > MOST_CONTROLS * len(raw) or raw.startswith(b"%PDF-")


def _magic(raw: bytes) -> str:
    if raw[:4] == b"RIFF" or raw[4:8] == b"ftyp":
        return "image" if raw[8:12] in (b"WEBP", b"avif", b"heic") else "sound or film"
    return next((why for magic, why in MAGIC.items() if raw.startswith(magic)), "")


def _is_tar(raw: bytes) -> bool:
    if raw[257:262] != b"ustar":
        return False
    try:
        tarfile.TarInfo.frombuf(raw[:512], "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def _json(body: bytes, whole: bool, suffix: str, field: str) -> Format | NotText | None:
    """Return which JSON this is; None where it is none, or cannot be told from text."""
    lines = [line for line in body.split(b"\n") if line.strip()]
    if not lines:
        return None
    cut = not whole and not body.endswith(b"\n")
    values = [_value(line) for line in lines[: min(LINES, len(lines) - cut)]]
    rows = sum(isinstance(value, dict) for value in values)
    told = bool(values) and isinstance(values[0], dict) and field in values[0]
    named = suffix in JSON_NAMES
    # Where only the first line is good, what follows is damaged, and that will be said.
    if told or (rows and 2 * rows >= len(values) and (len(lines) > 1 or suffix in JSON_LINES)):
        return Format("jsonl")
    if named and 2 * sum(isinstance(value, str) for value in values) > len(values):
        return Format("strings")
    if not values and body.startswith(b"{") and _begins_json(body, False):
        return Format("jsonl")  # its first line is longer than what was looked at
    if body.startswith(b"["):
        return _array(body, whole, named, field)
    if _begins_json(body, whole):
        return NotText(NO_LIST) if body.startswith(b"{") or named else None
    if suffix in JSON_LINES or not _many_objects(body):
        return None
    return NotText(NO_LIST)


def _array(body: bytes, whole: bool, named: bool, field: str) -> Format | NotText | None:
    """Return the format of a text that begins with a bracket.

    It is a list of documents by its first element, or by the name.
    """
    text = body.decode("utf-8", "replace")[1:].lstrip()
    first = _first(text.encode())
    sound = _begins_json(body, whole)
    if isinstance(first, dict) and field in first:
        return Format("json")
    if isinstance(first, str) and (sound or named):
        return Format("json")
    if sound and not whole and first is None and text.startswith(('"', "{")):
        return Format("json")  # its first element is longer than what was looked at
    return NotText(NO_LIST) if sound else None


def _value(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None


def _first_value(body: bytes) -> Any:
    return next((_value(line) for line in body.split(b"\n") if line.strip()), None)


def _begins_json(body: bytes, whole: bool) -> bool:
    """Return whether this is one JSON value, or, unless it is the whole, the beginning of one."""
    text = body.decode("utf-8", "replace")
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        # Where the text breaks off: in a string, or at most a word before the end.
        at_end = error.msg.startswith("Unterminated string") or error.pos >= len(text) - 8
        return not whole and at_end
    except (ValueError, RecursionError):
        return False
    return True


def _first(body: bytes) -> Any:
    """The value that a text begins with, whatever follows; None where it is not complete."""
    try:
        return json.JSONDecoder().raw_decode(body.decode("utf-8", "replace"))[0]
    except (ValueError, RecursionError):
        return None


def _many_objects(body: bytes) -> bool:
    """Return whether this is one object after another, over many lines.

    Text may begin with braces too.
    """
    text = body.decode("utf-8", "replace")
    try:
        first, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and text[end:].lstrip()[:1] in ("", "{")


def _no_prose(text: str, suffix: str, whole: bool) -> str:
    """Return why a model should not read a text; "" where nothing speaks against it."""
    lines = [line for line in text.splitlines() if line.strip()]
    lines = lines[:-1] if len(lines) > 1 and not whole else lines
    if lines and all(_DIGEST.fullmatch(line) for line in lines):
        return "checksums"
    if suffix in TABLES or (len(lines) >= 10 and _is_table(lines)):
        return "table"
    return ""


def _is_table(lines: list[str]) -> bool:
    """Return whether all lines have as many cells, one column of them numbers.

    Verse has no such column.
    """
    for sign, least in (("\t", 1), (",", 2), (";", 2), ("|", 2)):
        if lines[0].count(sign) < least:
            continue
        try:
            rows = list(csv.reader(lines, delimiter=sign))
        except csv.Error:
            continue
        if len({len(row) for row in rows}) == 1 and any(
            all(_NUMBER.fullmatch(cell) for cell in column)
            for column in zip(*rows[1:], strict=True)
        ):
            return True
    return False
