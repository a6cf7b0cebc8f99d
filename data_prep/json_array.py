"""Elements of a JSON array of any length, one after another; only one of them is held.

Where one is broken, the next is looked for: behind a comma, with the first key of the others.
"""

import re
from typing import BinaryIO, NamedTuple

from megahybrid.data_prep.items import BOM

CHUNK_BYTES = 2**20
SPACE = b" \t\r\n"
OVERLAP = 4096  # a place to go on at is not longer
_STRUCTURE = re.compile(rb'["{}\[\]]')
_SCALAR_END = re.compile(rb"[,\]\s]")
_FIRST_KEY = re.compile(rb'\{\s*("(?:[^"\\]|\\.){0,200}")\s*:')


class Element(NamedTuple):
    """The bytes of an element and where they begin.

    With a `problem`: so many bytes of the file that hold no element.
    """

    raw: bytes
    offset: int
    size: int
    problem: str = ""


class ArrayReader:
    """A reader of the elements in order: call `next()` until it returns None.

    `skip_broken()` says that the last one was no JSON after all, and where to go on.
    """

    def __init__(self, file: BinaryIO, most_bytes: int) -> None:
        self._file, self._most = file, most_bytes
        self._held = bytearray()
        self._base = self._position = 0  # of what is held; within it
        self._lead = self._first_key = b""
        self._is_begun = self._is_over = False

    @property
    def of_strings(self) -> bool:
        """True where its elements are strings, as far as the first one shows."""
        return self._lead == b'"'

    def next(self) -> Element | None:
        """The next element, or what there is in its stead; None at the end."""
        if self._is_over:
            return None
        self._drop(self._position)
        begin = self._at()
        found = self._separator()
        if found == "end":
            self._is_over = True
            rest = self._rest()
            return Element(b"", begin, rest, "broken json") if rest else None
        if found == "cut":
            self._is_over = True
            return Element(b"", self._at(), 0, "truncated json")
        if found == "broken":
            return self._search(self._position, "broken json")
        return self._element()

    def skip_broken(self, element: Element, reason: str) -> Element:
        """Return the bytes that are lost with the last element, which `reason` says is no JSON.

        Reading goes on behind it, or within it where its end was another's.
        """
        return self._search(element.offset - self._base, reason, least=1)

    def learn(self, element: Element) -> None:
        """Learns from an element that was JSON how one begins."""
        if not self._first_key and (key := _FIRST_KEY.match(element.raw)):
            self._first_key = key.group(1)

    def _element(self) -> Element:
        self._drop(self._position)
        self._lead = self._lead or bytes(self._held[:1])
        end = self._end(0)
        if end < 0:
            cut = len(self._held) <= self._most
            return self._search(0, "truncated json" if cut else "line too long", least=1)
        self._position = end
        return Element(bytes(self._held[:end]), self._base, end)

    def _separator(self) -> str:
        """Pass over the separator that stands before an element."""
        if not self._is_begun:
            self._is_begun = True
            if self._byte() == BOM[0]:
                self._position += len(BOM)
            if self._byte() != ord("["):
                return "broken"
            self._position += 1
            return {ord("]"): "end", -1: "cut"}.get(self._byte(), "element")
        match self._byte():
            case -1:
                return "cut"
            case 0x5D:
                return "end"
            case 0x2C:
                self._position += 1
                return {ord("]"): "broken", -1: "cut"}.get(self._byte(), "element")
        return "broken"

    def _byte(self) -> int:
        """The next byte that is no space, not passed; -1 at the end."""
        while True:
            while self._position < len(self._held):
                if self._held[self._position] not in SPACE:
                    return self._held[self._position]
                self._position += 1
            if not self._more():
                return -1

    def _end(self, start: int) -> int:
        """Return the end of the value that begins at `start`.

        -1 where the file ends, or too much is held.
        """
        if self._held[start] not in b'"{[':
            while not (found := _SCALAR_END.search(self._held, start + 1)):
                if not self._more_of_one():
                    return -1
            return found.start()
        depth, position = 0, start
        while True:
            found = _STRUCTURE.search(self._held, position)
            if not found:
                position = len(self._held)
                if not self._more_of_one():
                    return -1
                continue
            position, sign = found.end(), found.group()
            del found
            if sign == b'"':
                position = self._string_end(position)
                if position < 0:
                    return -1
            else:
                depth += 1 if sign in b"{[" else -1
            if depth <= 0:
                return position

    def _string_end(self, position: int) -> int:
        while True:
            quote = self._held.find(b'"', position)
            if quote < 0:
                position = len(self._held)
                if not self._more_of_one():
                    return -1
                continue
            slashes = quote
            while self._held[slashes - 1] == 0x5C:
                slashes -= 1
            if (quote - slashes) % 2 == 0:
                return quote + 1
            position = quote + 1

    def _search(self, start: int, problem: str, least: int = 0) -> Element:
        """Give up the element that begins at `start` and look for the next one.

        It is looked for from `least` bytes on.
        """
        offset, beginning = self._base + start, bytes(self._held[start : start + 80])
        after = rb"\}\s*,\s*(?=\{\s*" + re.escape(self._first_key) + rb")"
        position, pattern = (
            start + least,
            re.compile(rb'"\s*,\s*(?=")' if self.of_strings else after),
        )
        while True:
            found = pattern.search(self._held, position)
            if found:
                # At the comma, so that what follows is read as any other.
                self._position = found.start() + 1
                del found
                size = self._at() - offset
                if problem == "truncated json" or (
                    problem == "line too long" and size <= self._most
                ):
                    problem = "broken json"
                return Element(beginning, offset, size, problem)
            self._drop(max(position, len(self._held) - OVERLAP))
            position = 0
            if not self._more():
                self._position = len(self._held)
                self._is_over = True
                return Element(beginning, offset, self._at() - offset, problem)

    def _at(self) -> int:
        return self._base + self._position

    def _drop(self, count: int) -> None:
        del self._held[:count]
        self._base += count
        self._position = max(0, self._position - count)

    def _more(self) -> bool:
        data = self._file.read(CHUNK_BYTES)
        self._held += data
        return bool(data)

    def _more_of_one(self) -> bool:
        return len(self._held) <= self._most and self._more()

    def _rest(self) -> int:
        """Read to the end and return how many bytes stand behind the array.

        They are counted from the first that is no space.
        """
        self._position += 1
        if self._byte() < 0:
            return 0
        count = len(self._held) - self._position
        while data := self._file.read(CHUNK_BYTES):
            count += len(data)
        return count
