"""A line of .jsonl that is too long to be held three times: as bytes, as text and as its value.

Its long strings are cut out, what is left is parsed as JSON, and the string in the text field is
unescaped piece by piece. Only the line itself is held.
"""

import json
from collections.abc import Iterator
from typing import Any

LONG_STRING = 2**20
PIECE_BYTES = 2**20
SEARCHED = 4096  # how far back a place to cut at is looked for
MARK = "\x00long string "  # NUL cannot be in a document, so this is no text of one


def parse_long(line: bytes) -> tuple[Any, list[tuple[int, int]]]:
    """The value of a line, with `MARK` and a number for each long string, and where those lie.

    Raises ValueError where what is left is no JSON.
    """
    long: list[tuple[int, int]] = []
    kept: list[bytes] = []
    begin = position = 0
    while (start := line.find(b'"', position)) >= 0:
        end = _string_end(line, start + 1)
        if end - start > LONG_STRING:
            kept += [line[begin : start + 1], json.dumps(f"{MARK}{len(long)}").encode()[1:]]
            long.append((start + 1, end))
            begin = end + 1
        position = end + 1
    kept.append(line[begin:])
    return json.loads(b"".join(kept).decode("utf-8")), long


def _string_end(line: bytes, position: int) -> int:
    """Return where the quote stands that ends the string; the line's end where there is none."""
    while (quote := line.find(b'"', position)) >= 0:
        slashes = quote
        while line[slashes - 1] == 0x5C:
            slashes -= 1
        if (quote - slashes) % 2 == 0:
            return quote
        position = quote + 1
    return len(line)


def pieces_of(line: bytes, start: int, stop: int) -> Iterator[str]:
    """The string that lies escaped at start … stop - 1. Raises ValueError where it is none."""
    while start < stop:
        end = _cut(line, start, min(stop, start + PIECE_BYTES), stop)
        yield json.loads(b'"' + line[start:end] + b'"')
        start = end


def _cut(line: bytes, start: int, end: int, stop: int) -> int:
    """The last place up to `end` that no escape, no pair of them and no character reaches over."""
    while end < stop:
        for position in range(end, max(start, end - SEARCHED), -1):
            if line[position] & 0xC0 == 0x80:
                continue  # inside a character
            if b"\\" not in line[position - 6 : position]:
                return position
            # At an escape that begins here and is no second half of a pair.
            slashes = position
            while line[slashes - 1] == 0x5C:
                slashes -= 1
            if (
                line[position : position + 2] == b"\\u"
                and (position - slashes) % 2 == 0
                and line[position + 2 : position + 4].lower() not in (b"dc", b"dd", b"de", b"df")
            ):
                return position
        end += PIECE_BYTES
    return stop
