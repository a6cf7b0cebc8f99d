"""A survey of inputs: the files that are read and how, those that are left out and why."""

import contextlib
import hashlib
import os
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from megahybrid.data_prep import hub
from megahybrid.data_prep.compressed import packing_by_name
from megahybrid.data_prep.given_paths import is_kernels, is_open_file
from megahybrid.data_prep.inputs import InputFile, Unit, cut_units, identify, named_entries
from megahybrid.data_prep.items import Fields
from megahybrid.data_prep.sniff import NotText
from megahybrid.errors import DataError

STDIN = "-"
MOST_LEFT_OUT = 0.01  # of the bytes of an input: beyond it something was not meant
MOST_SUFFIX = 20
MOST_ROWS = 40
CHUNK_BYTES = 2**20

PrintLine = Callable[[str], object]


def print_nothing(line: str) -> None:
    """Print nothing."""


@dataclass(frozen=True)
class LeftOut:
    """A file that is not read."""

    path: Path
    size: int
    why: str


@dataclass(frozen=True)
class Source:
    """The files that one of the inputs gives."""

    given: str
    taken: tuple[InputFile, ...]
    left_out: tuple[LeftOut, ...] = ()
    is_file: bool = False

    def entry(self) -> dict[str, Any]:
        """Return the entry that a manifest keeps of it; the formats with their files."""
        formats = Counter(str(file.format) for file in self.taken)
        value: dict[str, Any] = {
            "path": self.given,
            "files": len(self.taken),
            "bytes": sum(file.size for file in self.taken),
            "formats": dict(sorted(formats.items())),
        }
        if self.left_out:
            size = sum(file.size for file in self.left_out)
            value["left_out"] = {"files": len(self.left_out), "bytes": size}
        return value


@dataclass(frozen=True)
class Survey:
    """The files that all inputs give, in their order."""

    sources: tuple[Source, ...]

    @property
    def files(self) -> list[InputFile]:
        """The files to read, each once, by however many names."""
        found: dict[str, InputFile] = {}
        for source in self.sources:
            for file in source.taken:
                found.setdefault(os.path.realpath(file.path), file)
        return list(found.values())

    def units(self) -> list[list[Unit]]:
        """Units of work of each input."""
        return [list(cut_units(source.taken)) for source in self.sources]

    def print_table(self, print_line: PrintLine) -> None:
        """Print as a table which files are read and which are left out, by suffix."""
        files, sizes = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
        left_out = {file.path: file for source in self.sources for file in source.left_out}
        rows = [
            (_suffix(file.path, file.shown), str(file.format), file.size) for file in self.files
        ]
        rows += [(_suffix(f.path), f"left out: {f.why}", f.size) for f in left_out.values()]
        for suffix, what, size in rows:
            files[suffix, what] += 1
            sizes[suffix, what] += size
        wide = max([len("suffix"), *(len(suffix) for suffix, _ in files)])
        print_line(f"{'suffix':{wide}}  {'files':>9}  {'bytes':>17}  read as")
        shown = sorted(files, key=lambda row: (-sizes[row], row))
        for row in shown[:MOST_ROWS]:
            print_line(f"{row[0]:{wide}}  {files[row]:>9,}  {sizes[row]:>17,}  {row[1]}")
        if rest := shown[MOST_ROWS:]:
            count, size = sum(files[row] for row in rest), sum(sizes[row] for row in rest)
            print_line(
                f"{'others':{wide}}  {count:>9,}  {size:>17,}  as said in {len(rest)} more rows"
            )


def survey(
    inputs: Sequence[str | Path],
    pattern: str = "**/*",
    fields: Fields | None = None,
    *,
    output: Path | None = None,
    print_line: PrintLine = print_nothing,
) -> Survey:
    """Look into every file that the inputs name, and print how each is read.

    What lies in `output` is no input. Raises DataError where an input names nothing, or where more
    than MOST_LEFT_OUT of its bytes are in files that hold no documents; files that are named one by
    one are weighed together.
    """
    fields = fields or Fields()
    if sum(_is_stream(given) for given in inputs) > 1:
        raise DataError(f"inputs={len(inputs)} name a stream twice (1 can be read). Name it once.")
    written = output.absolute() if output else None
    found = Survey(tuple(_source(given, pattern, fields, written) for given in inputs))
    found.print_table(print_line)
    single = [source for source in found.sources if source.is_file]
    for source in found.sources:
        if not source.is_file:
            _refuse_left_out([source])
    _refuse_left_out(single)
    return found


def _source(given: str | Path, pattern: str, fields: Fields, written: Path | None) -> Source:
    if _is_stream(given):
        file = _spooled(str(given), fields)
        if isinstance(file, LeftOut):
            return Source(str(given), (), (file,), is_file=True)
        return Source(str(given), (file,), is_file=True)
    entries = named_entries(given, pattern)
    taken: list[InputFile] = []
    left_out = []
    for path in entries:
        if written and not hub.is_hub(path) and path.absolute().is_relative_to(written):
            continue
        if not hub.is_hub(path) and not path.is_file():
            left_out.append(_link(path, Path(given)))
            continue
        if path.is_symlink() and is_kernels(path):
            left_out.append(LeftOut(path, 0, "the kernel's"))
            continue
        found = identify(path, fields)
        if isinstance(found, NotText):
            left_out.append(LeftOut(path, path.stat().st_size, found.why))
        else:
            taken.append(found)
    return Source(str(given), tuple(taken), tuple(left_out), is_file=Path(given).is_file())


def _link(path: Path, folder: Path) -> LeftOut:
    """Return a link that is not followed, with the bytes that it keeps from being read.

    None are where they lie in the folder that is searched as well.
    """
    if not path.is_dir():
        return LeftOut(path, 0, "dead link")
    real, searched = os.path.realpath(path), os.path.realpath(folder)
    size = 0
    if os.path.commonpath([real, searched]) not in (real, searched):
        for place, _, names in os.walk(real):
            for name in names:
                with contextlib.suppress(OSError):
                    size += os.lstat(os.path.join(place, name)).st_size
    return LeftOut(path, size, "link to a folder")


def _refuse_left_out(sources: Iterable[Source]) -> None:
    left_out = [file for source in sources for file in source.left_out]
    lost = sum(file.size for file in left_out)
    total = lost + sum(file.size for source in sources for file in source.taken)
    if lost <= MOST_LEFT_OUT * total:
        return
    largest = max(left_out, key=lambda file: file.size)
    reasons = Counter(file.why for file in left_out).most_common(3)
    told = ", ".join(f"{count:,} {why}" for why, count in reasons)
    names = ", ".join(source.given for source in sources if source.left_out)
    raise DataError(
        f"input {names[:200]} has {lost / total:.1%} of its bytes in files that are left out "
        f"({lost:,} of {total:,}, more than {MOST_LEFT_OUT:.0%}: {told}; the largest is "
        f"{largest.path.name}). Narrow it by --glob, correct --field, or say by --format how every "
        "file is to be read (text takes them as they are)."
    )


def _suffix(path: Path, shown: str = "") -> str:
    name = shown or path.name
    if hub.is_hub(path):
        return "hf:"
    last = Path(name).suffix
    suffix = Path(Path(name).stem).suffix + last if packing_by_name(name) else last
    clean = "".join(sign for sign in suffix if sign.isprintable())
    return clean[:MOST_SUFFIX] or (STDIN if shown else "(none)")


def _is_stream(given: str | Path) -> bool:
    """Return whether an input can be read only once, or only by this process."""
    if is_open_file(str(given)):
        return True
    try:
        mode = os.stat(given).st_mode
    except (OSError, ValueError):
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _spooled(given: str, fields: Fields) -> InputFile | LeftOut:
    """Return a stream as a file without a name, which its handle keeps.

    So it can be read more than once, and by other processes.
    """
    held: BinaryIO = tempfile.TemporaryFile()  # type: ignore[assignment]  # noqa: SIM115
    digest = hashlib.sha256()
    source = sys.stdin.buffer if given in (STDIN, "/dev/stdin") else open(given, "rb")  # noqa: SIM115
    if source is not sys.stdin.buffer and stat.S_ISCHR(os.fstat(source.fileno()).st_mode):
        raise DataError(f"input {given} is a device (a file or pipe can be read). Name another.")
    while data := source.read(CHUNK_BYTES):
        digest.update(data)
        held.write(data)
    held.flush()
    path = Path(f"/proc/{os.getpid()}/fd/{held.fileno()}")
    size = held.tell()
    found = identify(path, fields, name=STDIN)
    if isinstance(found, NotText):
        return LeftOut(Path(given), size, found.why)
    return replace(found, size=size, shown=given, held=held, digest=digest.hexdigest())
