"""Reading a checkpoint, whatever layout wrote it.

`Reader` opens one and gives any box of any tensor; `verify` reads every byte of one; `latest` (in
`latest.py`) finds the one to resume from. Files are safetensors and the manifest is JSON: nothing
here can run what a file holds.
"""

import math
import stat
from pathlib import Path
from typing import Any

import numpy as np

from megahybrid.checkpoint import durable
from megahybrid.checkpoint.collective import Ranks
from megahybrid.checkpoint.fragment_file import FragmentFile
from megahybrid.checkpoint.fragments import (
    Array,
    Box,
    Flat,
    State,
    coverage_fault,
    inside,
    intersect,
    rectangles,
    shape_of,
    slices,
    volume,
    whole,
)
from megahybrid.checkpoint.manifest import FileRecord, FragmentRecord, Manifest, read_manifest
from megahybrid.errors import CheckpointError

# Enough lines to see what happened to a folder; a lost disk would otherwise list thousands.
LISTED_PROBLEMS = 5


class Reader:
    """One complete checkpoint, open for reading; a context manager.

    Opening checks the manifest and the size of every file, and raises CheckpointError in one line;
    it does not read the data (`verify` does). Nothing is loaded until it is asked for.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self._open: dict[str, FragmentFile] = {}
        _raise(self.path, size_problems(self.path, self.manifest))

    def read(self, name: str, state: str, box: Box) -> Array:
        """The box of a canonical tensor, float32, of the box's shape."""
        return self.read_flat(name, state, box, (0, volume(box))).reshape(shape_of(box))

    def read_flat(
        self, name: str, state: str, box: Box, flat: Flat, out: Array | None = None
    ) -> Array:
        """Elements flat[0]…flat[1] of the box in row-major order: [flat[1] - flat[0]], float32.

        They are put in `out` (contiguous) where it is given, which saves a copy.
        Raises CheckpointError where the checkpoint has no such tensor, its shape does not hold the
        box, or its fragments do not hold each wanted element exactly once.
        """
        parts = self._parts(name, state, box)
        targets = rectangles(box, flat)
        for target, _ in targets:
            fault = coverage_fault(((part.box, part.flat) for part in parts), target)
            if fault:
                raise CheckpointError(
                    f"{self.path}: {name} ({state}): {fault}. Use another step's folder."
                )
        if out is None:
            out = np.empty(flat[1] - flat[0], dtype=np.float32)
        for part in parts:
            if (part.box, part.flat) == (box, flat):  # written by this layout
                self._file(part.file).read(part, 0, out)
                return out
        for target, offset in targets:
            view = out[offset : offset + volume(target)].reshape(shape_of(target))
            for part in parts:
                self._copy(part, target, view)
        return out

    def coverage(self) -> None:
        """Raise CheckpointError unless every tensor's states are held exactly once."""
        _raise(self.path, self.manifest.coverage())

    def close(self) -> None:
        """Let go of the files."""
        while self._open:
            self._open.popitem()[1].close()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _parts(self, name: str, state: str, box: Box) -> list[FragmentRecord]:
        tensor = self.manifest.tensors.get(name)
        if tensor is None:
            raise CheckpointError(
                f"{self.path} holds no tensor {name!r} (it holds {len(self.manifest.tensors)}). "
                "It is of another model."
            )
        if state not in tensor.states:
            raise CheckpointError(
                f"{self.path} holds no {state} of {name} (it holds {', '.join(tensor.states)}). "
                "Start from its weights alone (start.take=weights)."
            )
        if not inside(box, whole(tensor.shape)):
            raise CheckpointError(
                f"{self.path}: {name} has shape {list(tensor.shape)}, which does not hold the "
                f"wanted {[list(side) for side in box]}. It is of another model."
            )
        return [part for part in self.manifest.of(name, state) if intersect(part.box, box)]

    def _copy(self, part: FragmentRecord, target: Box, view: Array) -> None:
        """Copy what one fragment holds of the box `target` to its place in `view`."""
        for source, offset in rectangles(part.box, part.flat):
            shared = intersect(source, target) if target else source
            if shared is None:
                continue
            row, first = 1, 0
            if source:
                # Whole rows of the source lie together in the file: read those, then pick columns.
                row = math.prod(shape_of(source)[1:])
                first = shared[0][0] - source[0][0]
            rows = shared[0][1] - shared[0][0] if shared else 1
            start = offset + first * row
            data = np.empty(rows * row, dtype=np.float32)
            self._file(part.file).read(part, start, data)
            band = (shared[0], *source[1:]) if shared else ()
            view[slices(shared, target)] = data.reshape(shape_of(band))[slices(shared, band)]

    def _file(self, name: str) -> FragmentFile:
        if name not in self._open:
            self._open[name] = FragmentFile(self.path / name)
        return self._open[name]


class FlatValues:
    """Flat float32 values of a box of a tensor, which are read when they are written."""

    def __init__(self, reader: Reader, name: str, state: State, box: Box) -> None:
        self.reader, self.name, self.state, self.box = reader, name, state, box

    def __len__(self) -> int:
        return volume(self.box)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self.reader.read(self.name, self.state, self.box).reshape(-1)


def verify(path: Path | str, ranks: Ranks | None = None) -> Manifest:
    """Read every byte of a checkpoint and return its manifest.

    Raises CheckpointError, in one line, with each file that is missing, unexpected, of the wrong
    size or damaged (and in which bytes), and each tensor that is not held exactly once. With
    `ranks` it is collective: each reads its part of the bytes, and all come to the same answer.
    """
    path, ranks = Path(path), ranks or Ranks()
    manifest: Manifest | None = None
    bad: dict[str, list[int]] = {}
    refusal: int | None = None  # errno of a file system that did not give what it holds
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        problems, refusal = [str(error)], error.system_errno
        if ranks.count == 1:
            raise
    else:
        problems = size_problems(path, manifest)
        unreadable, bad, refusal = _share_of_bytes(path, manifest, ranks, problems)
        problems += unreadable
    answers = ranks.gather([problems, bad, refusal])
    found = list(dict.fromkeys(line for lines, *_ in answers for line in lines))
    refusal = next((number for *_, number in answers if number is not None), None)
    damaged: dict[str, list[int]] = {}
    for _, of_rank, _ in answers:
        for name, blocks in of_rank.items():
            damaged[name] = sorted([*damaged.get(name, []), *blocks])
    if manifest is None:
        raise CheckpointError(found[0]).because(refusal)
    found += [_damage(name, manifest.files[name], damaged[name]) for name in sorted(damaged)]
    _raise(path, found + manifest.coverage(), refusal)
    return manifest


def _share_of_bytes(
    path: Path, manifest: Manifest, ranks: Ranks, known: list[str]
) -> tuple[list[str], dict[str, list[int]], int | None]:
    """Check this rank's share of all blocks.

    Returns what could not be read, the damaged blocks by file, and the errno of the last refusal.
    Files that the lines `known` begin with are left out.

    Shares are runs of blocks in the order of files, so that a rank of the layout that wrote them
    reads about the file that it will load.
    """
    total = sum(len(record.crc32) for record in manifest.files.values())
    low, high = (total * edge // ranks.count for edge in (ranks.rank, ranks.rank + 1))
    problems: list[str] = []
    bad: dict[str, list[int]] = {}
    refusal: int | None = None
    at = 0
    for name, record in manifest.files.items():
        blocks = range(max(low - at, 0), min(high - at, len(record.crc32)))
        at += len(record.crc32)
        if not blocks or any(line.startswith(f"{name} ") for line in known):
            continue
        try:
            found = durable.damaged_blocks(path / name, record, blocks)
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
            refusal = error.errno
            continue
        if found:
            bad[name] = found
        elif blocks.start == 0:
            problems += _table_problems(path, name, manifest)
    return problems, bad, refusal


def _damage(name: str, record: FileRecord, bad: list[int]) -> str:
    start = bad[0] * record.block_bytes
    end = min(start + record.block_bytes, record.bytes)
    return (
        f"{name} is damaged in {len(bad)} of {len(record.crc32)} blocks "
        f"(the first is bytes {start} to {end})"
    )


def _table_problems(path: Path, name: str, manifest: Manifest) -> list[str]:
    """Return the line that says how a file's own table differs from the manifest, if it does."""
    try:
        opened = FragmentFile(path / name)
    except CheckpointError as error:
        return [str(error)]
    try:
        for part in manifest.fragments:
            if part.file == name:
                opened.check(part)
    except CheckpointError as error:
        return [str(error)]
    finally:
        opened.close()
    return []


def quick_check(path: Path) -> str | None:
    """Return what is wrong with a checkpoint's manifest or its files' sizes, or None.

    No data is read.
    """
    try:
        check_sizes(path)
    except CheckpointError as error:
        return str(error)
    return None


def check_sizes(path: Path) -> None:
    """Raise CheckpointError where a manifest or the size of a file is wrong; reads no data."""
    _raise(path, size_problems(path, read_manifest(path)))


def size_problems(path: Path, manifest: Manifest) -> list[str]:
    """A line for each file that is missing, not listed, or not of its size."""
    problems = []
    for name, record in manifest.files.items():
        try:
            found = (path / name).stat()
        except OSError as error:
            problems.append(f"{name} is missing ({error.strerror})")
            continue
        if not stat.S_ISREG(found.st_mode):
            problems.append(f"{name} is not a plain file")
        elif found.st_size != record.bytes:
            problems.append(
                f"{name} has {found.st_size} bytes, not the {record.bytes} of the manifest"
            )
    for extra in sorted(path.glob("fragments-*")):
        if extra.name not in manifest.files:
            problems.append(f"{extra.name} is not listed in the manifest")
    return problems


def _raise(path: Path, problems: list[str], refusal: int | None = None) -> None:
    if problems:
        listed = "; ".join(problems[:LISTED_PROBLEMS])
        more = len(problems) - LISTED_PROBLEMS
        rest = f"; and {more} more" if more > 0 else ""
        raise CheckpointError(f"{path}: {listed}{rest}. Use another step's folder.").because(
            refusal
        )
