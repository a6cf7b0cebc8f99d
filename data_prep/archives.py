"""Members of .tar (also as .gz or .zst) and .zip, one after another, never extracted to disk.

What is broken is named with its place and passed over: a .tar is searched for its next header, and
so is a .zip without its directory; a member of a .zip fails its checksum before a byte of it is
used. Names are labels and nothing else.
"""

import io
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from data_prep.compressed import BOMB_BYTES, BOMB_RATIO, kind_of, open_stretch, scan
from data_prep.zip_salvage import SalvagedZip, is_sound

BLOCK = 512
SEARCH_BYTES = 2**20
MOST_HEADER_BYTES = 2**20  # of a long name or pax header
USTAR_PLACE = 257
LEFT_OUT = ("__pycache__", "__MACOSX")


class Truncated(OSError):
    """A member that ends before its size."""


@dataclass(frozen=True)
class Member:
    """One file of an archive, to be read before the next is asked for.

    problem: why it, or the archive at byte `offset` (of the unpacked tar), cannot be used.
    """

    name: str
    size: int = 0
    file: BinaryIO = io.BytesIO()  # noqa: RUF009 (empty, for a member with a problem)
    problem: str = ""
    offset: int = 0


def is_archive(name: str | Path) -> bool:
    """Whether a file is a .tar or .zip, by its name."""
    path = Path(str(name).lower())
    return path.suffix in (".tar", ".tgz", ".tzst", ".zip") or (
        kind_of(path) is not None and Path(path.stem).suffix == ".tar"
    )


def member_ranges(path: Path, unit_bytes: int) -> Iterator[tuple[int, int, int]]:
    """First and last + 1 of members that make about `unit_bytes` on disk, and that size.

    A .tar is one range: its members are found only by reading it.
    """
    size = path.stat().st_size
    if path.suffix.lower() != ".zip":
        yield 0, 1, size
        return
    try:
        sizes = [info.compress_size for info in _zip(str(path), *_facts(path)).infolist()]
    except OSError:
        sizes = []
    if not sizes:
        yield 0, 1, size  # reading it names the fault, if there is one
        return
    start = held = 0
    for index, member in enumerate(sizes):
        if index > start and held + member > unit_bytes:
            yield start, index, held
            start, held = index, 0
        held += member
    yield start, len(sizes), held


def members(path: str | Path, start: int, stop: int) -> Iterator[Member]:
    """The files of an archive, hidden ones left out; of a .zip members start … stop - 1."""
    read = _zip_members(Path(path), start, stop)
    if Path(path).suffix.lower() != ".zip":
        read = _tar_members(Path(path))
    return (member for member in read if not _hidden(member.name))


def _hidden(name: str) -> bool:
    return any(
        part in LEFT_OUT or (part.startswith(".") and part not in (".", ".."))
        for part in PurePosixPath(name).parts
    )


def _facts(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@lru_cache(maxsize=2)
def _zip(path: str, size: int, mtime_ns: int) -> zipfile.ZipFile | SalvagedZip:
    try:
        found = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return SalvagedZip(Path(path))
    return found if is_sound(path, found.infolist()) else SalvagedZip(Path(path))


def _zip_members(path: Path, start: int, stop: int) -> Iterator[Member]:
    archive = _zip(str(path), *_facts(path))
    if start == 0 and isinstance(archive, SalvagedZip):
        yield Member("", problem="broken or truncated zip", offset=archive.end)
    for info in archive.infolist()[start:stop]:
        folder = info.filename.endswith("/") and not info.file_size
        if folder or stat.S_ISLNK(info.external_attr >> 16):
            continue
        name = _shown(info.filename)
        if problem := _zip_problem(archive, info):
            yield Member(name, problem=problem, offset=info.header_offset)
            continue
        with archive.open(info) as file:
            yield Member(name, info.file_size, _buffered(file), offset=info.header_offset)


def _zip_problem(archive: zipfile.ZipFile | SalvagedZip, info: zipfile.ZipInfo) -> str:
    """Why a member cannot be used; "" when all of it unpacks to its checksum."""
    if info.flag_bits & 1:
        return "encrypted zip member"
    size = 0
    try:
        with archive.open(info) as file:
            while data := file.read(2**20):
                size += len(data)
                if size > BOMB_BYTES and size > BOMB_RATIO * info.compress_size:
                    return "decompression bomb"
    except NotImplementedError:
        return "zip method not read"
    except Exception:  # zlib, bz2, lzma, struct and zipfile each raise their own
        return "broken zip member"
    return "" if size == info.file_size else "broken zip member"


def _buffered(file: Any) -> BinaryIO:
    return io.BufferedReader(file, 2**20)


def _shown(name: str) -> str:
    """A name that can be written as UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _tar_members(path: Path) -> Iterator[Member]:
    if kind_of(path) is None:
        with open(path, "rb") as file:
            yield from _Tar(file, 0).members()
        return
    stretches = scan(path)
    if not stretches:
        yield Member("", problem="truncated tar")
    for stretch in stretches:
        with open_stretch(path, stretch) as file:
            yield from _Tar(file, stretch.offset, whole=not stretch.problem).members()
        if stretch.problem:
            end = stretch.offset + stretch.bytes
            yield Member("", problem=stretch.problem, offset=end)


class _Tar:
    """A .tar read forwards. whole=False: that it has no end is told by the caller."""

    def __init__(self, file: BinaryIO, offset: int, whole: bool = True) -> None:
        self._file, self._offset, self._whole = file, offset, whole
        self._ahead = b""

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; fewer only at the end."""
        data = self._ahead[:size]
        self._ahead = self._ahead[size:]
        while len(data) < size and (more := self._file.read(size - len(data))):
            data += more
        self._offset += len(data)
        return data

    def members(self) -> Iterator[Member]:
        """Every regular file, and a Member with a problem for whatever is none."""
        ended = False
        name, size = "", -1  # from a header that stands before its member's own
        while block := self.read(BLOCK):
            at = self._offset - len(block)
            if not block.strip(b"\0"):
                ended = True
                continue
            header = _header(block)
            if header is None:
                cut = len(block) < BLOCK
                yield Member("", problem="truncated tar" if cut else "broken tar header", offset=at)
                if cut or not self._find_header(block):
                    return
                name, size = "", -1
                continue
            ended = False
            if header.type in _LONG_HEADERS:
                extra = self._extra(header)
                if extra is None:
                    yield Member("", problem="broken tar header", offset=at)
                    name, size = "", -1
                elif header.type == tarfile.GNUTYPE_LONGNAME:
                    name = extra.split(b"\0")[0].decode("utf-8", "surrogateescape")
                elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                    name, size = _pax(extra, name, size)
                continue
            length = header.size if size < 0 else size
            shown = _shown(name or header.name)
            name, size = "", -1
            empty = not header.isreg() and header.type in tarfile.SUPPORTED_TYPES
            inside = _Payload(self, 0 if empty else length)
            if header.type == tarfile.GNUTYPE_SPARSE:
                yield Member(shown, problem="sparse tar member", offset=at)
            elif header.isreg():
                yield Member(shown, length, io.BufferedReader(inside, 2**16), offset=at)
            if not inside.skip():
                if not inside.told:
                    yield Member(shown, problem="truncated tar", offset=self._offset)
                return
        if not ended and self._whole:
            yield Member("", problem="truncated tar", offset=self._offset)

    def _extra(self, header: tarfile.TarInfo) -> bytes | None:
        if header.size > MOST_HEADER_BYTES:
            return None
        padded = -(-header.size // BLOCK) * BLOCK
        data = self.read(padded)
        return data[: header.size] if len(data) == padded else None

    def _find_header(self, block: bytes) -> bool:
        """Goes on at the next header, wherever it begins; False where there is none."""
        data = block[1:] + self.read(SEARCH_BYTES)
        while len(data) >= BLOCK:
            place = data.find(b"ustar", USTAR_PLACE)
            while place >= 0:
                begin = place - USTAR_PLACE
                if len(data) - begin < BLOCK:
                    break
                if _header(data[begin : begin + BLOCK]) is not None:
                    self._ahead = data[begin:] + self._ahead
                    self._offset -= len(data) - begin
                    return True
                place = data.find(b"ustar", place + 1)
            more = self.read(SEARCH_BYTES)
            if not more:
                return False
            data = data[-BLOCK:] + more
        return False


_LONG_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


def _header(block: bytes) -> tarfile.TarInfo | None:
    try:
        found = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return None
    return found if found.size >= 0 else None


def _pax(raw: bytes, name: str, size: int) -> tuple[str, int]:
    """Name and size that a pax header gives, else those given."""
    while raw:
        head, _, _ = raw.partition(b" ")
        if not head.isdigit() or not 0 < int(head) <= len(raw):
            break
        key, _, value = raw[len(head) + 1 : int(head) - 1].partition(b"=")
        if key == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif key == b"size" and value.isdigit():
            size = int(value)
        raw = raw[int(head) :]
    return name, size


class _Payload(io.RawIOBase):
    """The bytes of one member. Raises Truncated where they end too early."""

    def __init__(self, tar: _Tar, size: int) -> None:
        self._tar, self._left = tar, size
        self._padding = -size % BLOCK
        self.told = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._tar.read(min(len(buffer), self._left))
        if not data and self._left and len(buffer):
            self.told = True
            raise Truncated("truncated tar")
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)

    def skip(self) -> bool:
        """Reads what nobody read, and the padding; False where the archive ends before."""
        while self._left:
            data = self._tar.read(min(2**20, self._left))
            if not data:
                return False
            self._left -= len(data)
        return len(self._tar.read(self._padding)) == self._padding
