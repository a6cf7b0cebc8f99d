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

from megahybrid.data_prep.compressed import (
    BOMB,
    BOMB_BYTES,
    BOMB_RATIO,
    Packing,
    open_stretch,
    packing_by_name,
    scan,
)
from megahybrid.data_prep.zip_salvage import SalvagedZip, is_sound

BLOCK = 512
SEARCH_BYTES = BUFFER_BYTES = 2**20
MOST_HEADER_BYTES = 2**20  # of a long name or pax header
USTAR_PLACE = 257
LEFT_OUT = ("__pycache__", "__MACOSX")


class Truncated(OSError):
    """A member ends before its size.

    left: bytes on disk that it lacks; absent: those that are in no other part of the file either.
    """

    def __init__(self, reason: str, left: float = 0.0, absent: float = 0.0) -> None:
        super().__init__(reason)
        self.left, self.absent = left, absent


@dataclass(frozen=True)
class Member:
    """One file of an archive, to be read before the next is asked for.

    problem: why it, or the archive at byte `offset` (of the unpacked tar), cannot be used.
    packed: bytes on disk that it takes up, or that are lost with it; of these `absent` are named
    by a header but not there any more.
    """

    name: str
    size: int = 0
    file: io.BufferedReader = io.BufferedReader(io.BytesIO())  # type: ignore[arg-type]  # noqa: RUF009
    problem: str = ""
    offset: int = 0
    packed: float = 0.0
    absent: float = 0.0

    @property
    def rate(self) -> float:
        """The bytes on disk for each byte of its text."""
        return self.packed / self.size if self.size else 0.0


def is_archive(name: str | Path) -> bool:
    """Return whether a file is a .tar or .zip, by its name."""
    path = Path(str(name).lower())
    return path.suffix in (".tar", ".tgz", ".tzst", ".zip") or (
        packing_by_name(path) is not None and Path(path.stem).suffix == ".tar"
    )


def member_ranges(path: Path, unit_bytes: int) -> Iterator[tuple[int, int, int]]:
    """First and last + 1 of a .zip's members that make about `unit_bytes` on disk; that size."""
    size = path.stat().st_size
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


def zip_members(path: str | Path, start: int, stop: int) -> Iterator[Member]:
    """The files start … stop - 1 of a .zip, hidden ones left out."""
    read = _zip_members(Path(path), start, stop)
    return (member for member in read if not _hidden(member.name))


def tar_members(path: str | Path, packing: Packing | None) -> Iterator[Member]:
    """The files of a .tar, hidden ones left out."""
    read = _tar_members(Path(path), packing)
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
        yield Member("", problem="broken or truncated zip", offset=archive.end, packed=archive.lost)
    for info in archive.infolist()[start:stop]:
        folder = info.filename.endswith("/") and not info.file_size
        if folder or stat.S_ISLNK(info.external_attr >> 16):
            continue
        name = _shown(info.filename)
        if problem := _zip_problem(archive, info):
            yield Member(
                name, problem=problem, offset=info.header_offset, packed=info.compress_size
            )
            continue
        with archive.open(info) as file:
            yield Member(
                name,
                info.file_size,
                _buffered(file, info.file_size),
                offset=info.header_offset,
                packed=info.compress_size,
            )


def _zip_problem(archive: zipfile.ZipFile | SalvagedZip, info: zipfile.ZipInfo) -> str:
    """Return why a member cannot be used; "" when all of it unpacks to its checksum."""
    if info.flag_bits & 1:
        return "encrypted zip member"
    size = 0
    try:
        with archive.open(info) as file:
            while data := file.read(2**20):
                size += len(data)
                if size > BOMB_BYTES and size > BOMB_RATIO * info.compress_size:
                    return BOMB
    except NotImplementedError:
        return "zip method not read"
    except Exception:  # zlib, bz2, lzma, struct and zipfile each raise their own
        return "broken zip member"
    return "" if size == info.file_size else "broken zip member"


def _buffered(file: Any, size: int) -> io.BufferedReader:
    return io.BufferedReader(file, max(1, min(size, BUFFER_BYTES)))


def _shown(name: str) -> str:
    """A name that can be written as UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _tar_members(path: Path, packing: Packing | None) -> Iterator[Member]:
    if packing is None:
        with open(path, "rb") as file:
            yield from _Tar(file).members()
        return
    stretches = scan(path, packing)
    if not stretches:
        yield Member("", problem="truncated tar")
    for stretch in stretches:
        with open_stretch(path, packing, stretch) as file:
            # What a member lacks before a broken stretch is among the bytes of that.
            yield from _Tar(
                file,
                stretch.offset,
                rate=stretch.rate,
                whole=not stretch.problem,
                ends=not stretch.lost and not stretch.absent,
            ).members()
        if stretch.problem:
            yield Member(
                "",
                problem=stretch.problem,
                offset=stretch.offset + stretch.bytes,
                packed=stretch.lost + stretch.absent,
                absent=stretch.absent,
            )


class _Tar:
    """A .tar read forwards.

    rate: bytes on disk for each of its own. whole=False: the caller reports that it has no end.
    ends: the bytes that a last member lacks are nowhere else.
    """

    def __init__(
        self,
        file: BinaryIO,
        offset: int = 0,
        *,
        rate: float = 1.0,
        whole: bool = True,
        ends: bool = True,
    ) -> None:
        self._file, self._offset, self._whole = file, offset, whole
        self.rate, self.ends = rate, ends
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
                found, passed = (False, len(block)) if cut else self._find_header(block)
                problem = "truncated tar" if cut else "broken tar header"
                yield Member("", problem=problem, offset=at, packed=passed * self.rate)
                if not found:
                    return
                name, size = "", -1
                continue
            ended = False
            if header.type in _LONG_HEADERS:
                extra = self._extra(header)
                if extra is None:
                    packed = (self._offset - at) * self.rate
                    yield Member("", problem="broken tar header", offset=at, packed=packed)
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
            packed = (BLOCK + length + inside.padding) * self.rate
            if header.type == tarfile.GNUTYPE_SPARSE:
                yield Member(shown, problem="sparse tar member", offset=at, packed=packed)
            elif header.isreg():
                yield Member(shown, length, _buffered(inside, length), offset=at, packed=packed)
            if not inside.skip():
                if not inside.reported:
                    yield Member(
                        shown, problem="truncated tar", offset=self._offset, absent=inside.absent
                    )
                return
        if not ended and self._whole:
            yield Member("", problem="truncated tar", offset=self._offset)

    def _extra(self, header: tarfile.TarInfo) -> bytes | None:
        if header.size > MOST_HEADER_BYTES:
            return None
        padded = -(-header.size // BLOCK) * BLOCK
        data = self.read(padded)
        return data[: header.size] if len(data) == padded else None

    def _find_header(self, block: bytes) -> tuple[bool, int]:
        """Go on at the next header, wherever it begins.

        Returns whether there is one, and how many bytes were passed over for it; the zeros at an
        archive's end are none.
        """
        begun, used = self._offset - len(block), len(block)
        data = block[1:] + self.read(SEARCH_BYTES)
        while len(data) >= BLOCK:
            position = data.find(b"ustar", USTAR_PLACE)
            while position >= 0:
                begin = position - USTAR_PLACE
                if len(data) - begin < BLOCK:
                    break
                if _header(data[begin : begin + BLOCK]) is not None:
                    self._ahead = data[begin:] + self._ahead
                    self._offset -= len(data) - begin
                    return True, self._offset - begun
                position = data.find(b"ustar", position + 1)
            if held := len(data.rstrip(b"\0")):
                used = self._offset - len(data) + held - begun
            more = self.read(SEARCH_BYTES)
            if not more:
                break
            data = data[-BLOCK:] + more
        return False, used


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
        self.padding = -size % BLOCK
        self.reported = False

    @property
    def absent(self) -> float:
        """Bytes on disk that it lacks and that are nowhere else."""
        return self._left * self._tar.rate if self._tar.ends else 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._tar.read(min(len(buffer), self._left))
        if not data and self._left and len(buffer):
            self.reported = True
            raise Truncated("truncated tar", self._left * self._tar.rate, self.absent)
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
        return len(self._tar.read(self.padding)) == self.padding
