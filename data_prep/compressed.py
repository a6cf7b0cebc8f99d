"""Reading .gz and .zst: members are checked before a byte of them is used, and never trusted.

A gzip file is a row of members, a zstd file a row of frames, each with a checksum at its end. A
first pass (fifty times faster than the tokenizing that follows) finds which of them are whole; a
second one hands out the bytes of those. So nothing that fails its checksum becomes a token, and one
broken member does not take the others with it.
"""

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from megahybrid.errors import DataError

Packing = Literal["gzip", "zstd"]
GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"
MAGIC: dict[Packing, bytes] = {"gzip": GZIP_MAGIC, "zstd": ZSTD_MAGIC}
PACKING_BY_SUFFIX: dict[str, Packing] = {
    ".gz": "gzip",
    ".tgz": "gzip",
    ".zst": "zstd",
    ".tzst": "zstd",
}
INPUT_BYTES = 2**16
SURE_BYTES = 2**18  # of text that tell how well a member is packed; a zstd block gives half of it
MOST_HEADER_BYTES = 18  # of a zstd frame
MOST_WINDOW_BYTES = 2**31
ZSTD_INPUT_BYTES = 2**11  # a zstd block of 4 bytes can mean 128 KiB: more input, more memory
OUTPUT_BYTES = 2**20
# Text compresses 3 to 30 times, very repetitive text 100 times; a file of zeros 1000 times.
BOMB_RATIO, BOMB_BYTES = 200, 64 * 2**20
BOMB = "decompression bomb"


@dataclass(frozen=True)
class Stretch:
    """Whole members one after another: where they begin in the file and, unpacked, in its text.

    problem: what comes behind (or instead, when `bytes` is 0) and cannot be used; "" for nothing.
    A truncated last member is used up to where it breaks off.

    packed, lost: bytes on disk of the whole members, and of what cannot be used. absent: bytes on
    disk that a truncated member would go on for, where it says how long it is.
    """

    start: int
    offset: int
    bytes: int
    problem: str = ""
    packed: int = 0
    lost: int = 0
    absent: float = 0.0

    @property
    def rate(self) -> float:
        """The bytes on disk for each byte of the text."""
        return self.packed / self.bytes if self.bytes else 0.0


class _Broken(Exception):
    """A member that cannot be unpacked."""


def packing_by_name(path: str | Path) -> Packing | None:
    """gzip, zstd or None, by the file's name."""
    return PACKING_BY_SUFFIX.get(Path(path).suffix.lower())


def packing_by_content(beginning: bytes) -> Packing | None:
    """gzip, zstd or None, by a file's first bytes."""
    return next((packing for packing, magic in MAGIC.items() if beginning.startswith(magic)), None)


def beginning_of(file: BinaryIO, packing: Packing, size: int) -> bytes:
    """Return up to `size` first bytes of the text.

    They are those of the next member that gives any where the first is broken from its beginning.
    """
    end = file.seek(0, io.SEEK_END)
    return _beginning(file, packing, 0, size) or _beginning(
        file, packing, _next_member(file, packing, 1, end), size
    )


def _beginning(file: BinaryIO, packing: Packing, begin: int, size: int) -> bytes:
    found = bytearray()
    for chunk in _members(file, packing, begin):
        found += chunk
        if len(found) >= size:
            break
    return bytes(found[:size])


def scan(path: str | Path, packing: Packing, content: bytes | None = None) -> list[Stretch]:
    """The usable stretches of a compressed file, in order; one with a problem ends at it.

    `content` is that of a file within an archive, where `path` is only its name.
    """
    found: list[Stretch] = []
    size = Path(path).stat().st_size if content is None else len(content)
    with _open(path, content) as file:
        start = begin = offset = begin_offset = 0

        def end_here(problem: str = "", lost: int = 0) -> Stretch:
            unpacked = offset - begin_offset
            packed = begin - start if unpacked else 0
            return Stretch(
                start, begin_offset, unpacked, problem, packed, lost + begin - start - packed
            )

        while begin < size:
            try:
                end, length, stated = _measure(file, packing, begin)
            except _Broken as error:
                if str(error) == BOMB:
                    return [*found, end_here(BOMB, size - begin)]
                following = _next_member(file, packing, begin + 1, size)
                found.append(end_here(str(error), following - begin))
                begin = start = following
                begin_offset = offset
                continue
            if end is None:
                part = _cut_off(size - begin, length, stated, begin / offset if offset else None)
                offset += length
                return [*found, part.joined(end_here(f"truncated {packing}"))]
            offset += length
            begin = end
        if offset > begin_offset:
            found.append(end_here())
    return found


@dataclass(frozen=True)
class _CutOff:
    """A truncated member: bytes on disk that were used, that were not, and that are not there."""

    used: int
    lost: int
    absent: float

    def joined(self, stretch: Stretch) -> Stretch:
        """The stretch of the members before it, which ends with it."""
        used = stretch.packed + self.used if stretch.bytes else 0
        return replace(
            stretch,
            packed=used,
            lost=stretch.lost + stretch.packed + self.used + self.lost - used,
            absent=self.absent,
        )


def _cut_off(here: int, length: int, stated: int, rate: float | None) -> _CutOff:
    """Return how the `here` bytes of a truncated member count: used, lost and absent.

    They gave `length` bytes of text, of `stated` in all by its header. `rate`: bytes on disk for
    each byte of the text before it.
    """
    if rate is None or length >= SURE_BYTES:
        rate = here / length if length else 0.0
    # The last block gives nothing where it is not whole.
    used = min(here, round(length * rate))
    return _CutOff(used, here - used, max(0.0, stated * rate - here))


def open_stretch(
    path: str | Path, packing: Packing, stretch: Stretch, content: bytes | None = None
) -> BinaryIO:
    """The text of a stretch as a file to read forwards."""
    return io.BufferedReader(_Unpacked(_open(path, content), packing, stretch), OUTPUT_BYTES)


def _open(path: str | Path, content: bytes | None) -> BinaryIO:
    return open(path, "rb") if content is None else io.BytesIO(content)


class _Unpacked(io.RawIOBase):
    def __init__(self, file: BinaryIO, packing: Packing, stretch: Stretch) -> None:
        self._file, self._left = file, stretch.bytes
        self._chunks = _members(file, packing, stretch.start)
        self._chunk = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._left and not len(self._chunk):
            self._chunk = memoryview(next(self._chunks, b""))[: self._left]
            if not len(self._chunk):
                raise OSError("changed while it was read")
        count = min(len(buffer), len(self._chunk))
        buffer[:count] = self._chunk[:count]
        self._chunk = self._chunk[count:]
        self._left -= count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _members(file: BinaryIO, packing: Packing, begin: int) -> Iterator[bytes]:
    """Text of the members from `begin` on; ends where one is truncated or broken."""
    while True:
        member = _Member(file, packing, begin)
        try:
            some = False
            for chunk in member.chunks():
                some = True
                yield chunk
        except _Broken:
            return
        if not member.whole or (member.end == begin and not some):
            return
        begin = member.end


def _measure(file: BinaryIO, packing: Packing, begin: int) -> tuple[int | None, int, int]:
    """Return the end of the member at `begin`, its unpacked bytes and its stated bytes.

    The end is None where it is truncated. The stated bytes are 0 where its header names none.
    """
    member = _Member(file, packing, begin)
    length = 0
    for chunk in member.chunks():
        length += len(chunk)
        if length > BOMB_BYTES and length > BOMB_RATIO * member.consumed:
            raise _Broken(BOMB)
    return (member.end, length, 0) if member.whole else (None, length, member.stated_length())


class _Member:
    """One gzip member or zstd frame at byte `begin`; `end` and `whole` are known after `chunks`."""

    def __init__(self, file: BinaryIO, packing: Packing, begin: int) -> None:
        self.file, self.packing, self.begin, self.end = file, packing, begin, begin
        self.whole, self.consumed = False, 0

    def chunks(self) -> Iterator[bytes]:
        """The text in pieces of bounded size. Raises _Broken at damage, not at a truncation."""
        self.file.seek(self.begin)
        if not self.file.read(1):
            self.whole = True
            return
        self.file.seek(self.begin)
        yield from self._gzip() if self.packing == "gzip" else self._zstd()

    def stated_length(self) -> int:
        """The bytes of text that its header names; 0 where it names none, as in gzip."""
        if self.packing != "zstd":
            return 0
        zstandard = _zstandard()
        self.file.seek(self.begin)
        try:
            return max(0, int(zstandard.frame_content_size(self.file.read(MOST_HEADER_BYTES))))
        except zstandard.ZstdError:
            return 0

    def _gzip(self) -> Iterator[bytes]:
        unpack = zlib.decompressobj(31)
        position = self.begin
        while not unpack.eof:
            raw = unpack.unconsumed_tail
            if not raw:
                raw = self.file.read(INPUT_BYTES)
                position += len(raw)
                if not raw:
                    return
            try:
                chunk = unpack.decompress(raw, OUTPUT_BYTES)
            except zlib.error:
                raise _Broken("broken gzip member") from None
            self.consumed = position - self.begin
            if chunk:
                yield chunk
        self.end = position - len(unpack.unused_data)
        self.whole = True

    def _zstd(self) -> Iterator[bytes]:
        zstandard = _zstandard()
        # A window of 2 GiB is what `zstd --long=31` writes; only what is filled of it takes memory.
        unpack = zstandard.ZstdDecompressor(max_window_size=MOST_WINDOW_BYTES).decompressobj()
        position = self.begin
        while not unpack.eof:
            raw = self.file.read(ZSTD_INPUT_BYTES)
            position += len(raw)
            if not raw:
                return
            try:
                chunk = unpack.decompress(raw)
            except zstandard.ZstdError:
                raise _Broken("broken zstd frame") from None
            self.consumed = position - self.begin
            if chunk:
                yield chunk
        self.end = position - len(unpack.unused_data)
        self.whole = True


def _next_member(file: BinaryIO, packing: Packing, begin: int, size: int) -> int:
    """Return where the next member begins whose first MiB can be unpacked.

    `size` where none does.
    """
    magic = GZIP_MAGIC if packing == "gzip" else ZSTD_MAGIC
    position = begin
    while position < size:
        file.seek(position)
        raw = file.read(2**20)
        found = raw.find(magic)
        while found >= 0:
            if _begins(file, packing, position + found):
                return position + found
            found = raw.find(magic, found + 1)
        position += max(1, len(raw) - len(magic) + 1)
    return size


def _begins(file: BinaryIO, packing: Packing, begin: int) -> bool:
    member = _Member(file, packing, begin)
    length = 0
    try:
        for chunk in member.chunks():
            length += len(chunk)
            if length >= 2**20:
                break
    except _Broken:
        return False
    return length > 0


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise DataError(
            "inputs packed by zstd need the package zstandard, which is not installed. "
            "Run `pip install megahybrid[data]`."
        ) from None
    return zstandard
