"""Members of a .zip that has lost its directory, found by the headers that stand before each."""

import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from megahybrid.data_prep.compressed import BOMB_BYTES, BOMB_RATIO

LOCAL = struct.Struct("<4s5H3I2H")  # APPNOTE.TXT 4.3.7
LOCAL_MAGIC, DESCRIPTOR_MAGIC = b"PK\x03\x04", b"PK\x07\x08"
END_MAGIC, WIDE_END_MAGIC = b"PK\x05\x06", b"PK\x06\x06"
FOLLOWING = (LOCAL_MAGIC, b"PK\x01\x02", END_MAGIC, WIDE_END_MAGIC, b"PK\x06\x08")
MOST_END = 2**16 + 200  # of both ends and the comment
ENCRYPTED, DESCRIBED, UTF8 = 1, 8, 0x800
ZIP64, IN_EXTRA = 1, 0xFFFFFFFF
CHUNK_BYTES = 2**20
MOST_NAME = 1024  # characters: the length in a broken header means nothing
BROKEN = (0, 0, 1, None)  # nothing has the checksum 0


def is_sound(path: str | Path, listed: Sequence[zipfile.ZipInfo]) -> bool:
    """Return whether a directory that could be read is one of this file.

    It has as many members as its end says, which begin where it says and do not share their bytes.
    """
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        for info in (*listed[:1], *listed[-1:]):
            if info.header_offset < 0:
                return False
            file.seek(info.header_offset)
            if file.read(len(LOCAL_MAGIC)) != LOCAL_MAGIC:
                return False
        file.seek(max(0, size - MOST_END))
        raw = file.read()
    # Members that share their bytes unpack to any size without one of them standing out.
    if sum(info.compress_size for info in listed) > size:
        return False
    at = raw.rfind(END_MAGIC)
    stated = int.from_bytes(raw[at + 10 : at + 12], "little")
    wide = raw.rfind(WIDE_END_MAGIC, 0, max(0, at))
    if stated == 0xFFFF and wide >= 0:
        return len(listed) == int.from_bytes(raw[wide + 32 : wide + 40], "little")
    return len(listed) % 2**16 == stated  # old writers let the count run over


class SalvagedZip:
    """A damaged .zip with the part of ZipFile that reading needs: `infolist` and `open`.

    `end`: behind the last member found; `lost`: bytes that belong to no member, nor to what is left
    of the directory. What is found may still be broken; as of any .zip, that shows when a member is
    read to its end.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._members: list[zipfile.ZipInfo] = []
        self._begins: dict[int, int] = {}  # where a member's data begin, by its header's place
        self.end = 0
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            self.lost = at = _find(file, 0, size)
            while at < size:
                at = self._add(file, at, size)
                self.lost += at - self.end
            file.seek(self.end)
            if file.read(4) in FOLLOWING:
                self.lost -= size - self.end

    def infolist(self) -> list[zipfile.ZipInfo]:
        """The members, as they lie in the file."""
        return self._members

    def open(self, info: zipfile.ZipInfo) -> zipfile.ZipExtFile:
        """A member's bytes; raises BadZipFile at the end where they fail their checksum."""
        file = open(self._path, "rb")  # noqa: SIM115 (closed with the member)
        file.seek(self._begins[info.header_offset])
        return zipfile.ZipExtFile(file, "r", info, close_fileobj=True)

    def _add(self, file: BinaryIO, at: int, size: int) -> int:
        """Enters the member whose header is at `at`; returns where the next one's is."""
        file.seek(at)
        raw = file.read(LOCAL.size)
        if len(raw) < LOCAL.size:
            self.end = at
            return size
        _, _, flags, method, _, _, crc, packed, whole, name_bytes, extra_bytes = LOCAL.unpack(raw)
        name = file.read(name_bytes).decode("utf-8" if flags & UTF8 else "cp437", "replace")
        extra = file.read(extra_bytes)
        if packed == IN_EXTRA or whole == IN_EXTRA:
            packed, whole = _zip64(extra, packed, whole)
        begin = at + LOCAL.size + name_bytes + extra_bytes
        end: int | None = begin + packed
        if flags & DESCRIBED and not packed:
            packed, whole, crc, end = _described(file, begin, method)
        if end is None or not _follows(file, end, size):
            end = _find(file, at + len(LOCAL_MAGIC), size)  # its own header may be what is wrong
            packed = max(0, min(packed, end - begin))
        info = zipfile.ZipInfo(name[:MOST_NAME] or "?")
        info.flag_bits, info.compress_type, info.CRC = flags, method, crc
        info.compress_size, info.file_size, info.header_offset = packed, whole, at
        self._members.append(info)
        self._begins[at] = begin
        self.end = end
        return _find(file, end, size)


def _zip64(extra: bytes, packed: int, whole: int) -> tuple[int, int]:
    """Sizes that the 64-bit field gives, of those that are said to be there."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == ZIP64:
            body = extra[4 : 4 + length]
            sizes = (value for (value,) in struct.iter_unpack("<Q", body[: len(body) // 8 * 8]))
            whole = next(sizes, whole) if whole == IN_EXTRA else whole
            packed = next(sizes, packed) if packed == IN_EXTRA else packed
        extra = extra[4 + length :]
    return packed, whole


def _described(file: BinaryIO, begin: int, method: int) -> tuple[int, int, int, int | None]:
    """Packed size, size, checksum and end of a member whose descriptor stands behind it.

    Found by unpacking, as only deflate allows. BROKEN where that fails or no descriptor agrees.
    """
    if method != zipfile.ZIP_DEFLATED:
        return BROKEN
    file.seek(begin)
    unpack = zlib.decompressobj(-15)
    position, whole = begin, 0
    while not unpack.eof:
        raw = unpack.unconsumed_tail
        if not raw:
            raw = file.read(2**16)
            position += len(raw)
        try:
            whole += len(unpack.decompress(raw, CHUNK_BYTES))
        except zlib.error:
            return BROKEN
        if not raw or (whole > BOMB_BYTES and whole > BOMB_RATIO * (position - begin)):
            return BROKEN
    end = position - len(unpack.unused_data)
    file.seek(end)
    stated = file.read(24)
    marker = 4 * stated.startswith(DESCRIPTOR_MAGIC)
    for form in ("<3I", "<I2Q"):
        length = marker + struct.calcsize(form)
        if len(stated) >= length:
            crc, *sizes = struct.unpack_from(form, stated, marker)
            if sizes == [end - begin, whole]:
                return end - begin, whole, crc, end + length
    return BROKEN


def _follows(file: BinaryIO, end: int, size: int) -> bool:
    """Return whether a member may end here: the file does, or another part of it begins."""
    if end >= size:
        return end == size
    file.seek(end)
    return file.read(4) in FOLLOWING


def _find(file: BinaryIO, begin: int, size: int) -> int:
    """Return where the next member's header is; `size` where there is none."""
    step = len(LOCAL_MAGIC)  # it nearly always is right there
    while begin < size:
        file.seek(begin)
        raw = file.read(step)
        step = CHUNK_BYTES
        position = raw.find(LOCAL_MAGIC)
        if position >= 0:
            return begin + position
        begin += max(1, len(raw) - len(LOCAL_MAGIC) + 1)
    return size
