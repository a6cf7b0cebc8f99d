"""Metadata of documents beside their tokens: `shard-00000.jsonl`, line n for document n.

`shard-00000.jsonl.ends` holds where each line ends (i64, little endian), so that one is found
without reading the others. Training does not open them.
"""

import json
import os
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megahybrid.data.manifest import sync_folder
from megahybrid.data.shard_files import RESTORE
from megahybrid.data.token_file import ShardIndex, file_facts
from megahybrid.errors import DataError

NOTHING = b"{}"


class MetadataWriter:
    """A writer of the metadata of one shard; `finish` publishes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path.with_name(path.name + ".tmp"), "wb")  # noqa: SIM115
        self._ends, self._crc = array("q"), 0

    def add(self, metadata_lines: Sequence[bytes]) -> None:
        """Append one JSON object for each document."""
        end = self._ends[-1] if self._ends else 0
        metadata_lines = [metadata or NOTHING for metadata in metadata_lines]
        for metadata in metadata_lines:
            end += len(metadata) + 1
            self._ends.append(end)
        data = b"".join(metadata + b"\n" for metadata in metadata_lines)
        self._crc = zlib.crc32(data, self._crc)
        self._file.write(data)

    def finish(self) -> int:
        """Publish the lines, which are on disk then, and return their checksum."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        ends = _ends_path(self._path)
        with open(ends.with_name(ends.name + ".tmp"), "wb") as file:
            file.write(np.frombuffer(self._ends, np.int64).astype("<i8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        for path in (self._path, ends):
            os.replace(path.with_name(path.name + ".tmp"), path)
        sync_folder(self._path.parent)
        return self._crc


class DocumentMetadata:
    """The document metadata of one shard. Raises DataError where its sizes do not fit the shard."""

    def __init__(self, shard: ShardIndex, crc32: int) -> None:
        self.path, self.crc32, self.documents = metadata_path(shard), crc32, shard.documents
        ends = _ends_path(self.path)
        found, expected = file_facts(ends)[0], 8 * shard.documents
        if found == expected and shard.documents:
            found, expected = file_facts(self.path)[0], self._ends(shard.documents - 1, 1)[0]
        if found != expected:
            raise DataError(
                f"{self.path} and {ends.name} are not of this shard ({found} bytes, not "
                f"{expected}). Copy or prepare the data again."
            )

    def _ends(self, first: int, count: int) -> list[int]:
        found = np.fromfile(_ends_path(self.path), "<i8", count, offset=8 * first).tolist()
        if len(found) != count:
            raise DataError(f"{_ends_path(self.path)} is shorter than at open. {RESTORE}")
        return found

    def lines(self, first: int, stop: int) -> list[bytes]:
        """Return the lines of documents first … stop - 1."""
        if stop <= first:
            return []
        begins = self._ends(first - 1, stop - first + 1) if first else [0, *self._ends(0, stop)]
        with open(self.path, "rb") as file:
            file.seek(begins[0])
            raw = file.read(begins[-1] - begins[0])
        lines = raw.split(b"\n")[:-1]
        if len(lines) != stop - first or len(raw) != begins[-1] - begins[0]:
            raise DataError(f"{self.path} has no line for each document. {RESTORE}")
        return lines

    def of(self, document: int) -> dict[str, Any]:
        """Return the metadata of one document."""
        try:
            value = json.loads(self.lines(document, document + 1)[0])
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise DataError(f"{self.path} line {document + 1} is not a JSON object. {RESTORE}")
        return value

    def verify(self) -> None:
        """Raises DataError unless every line is as it was written, and where it should be."""
        crc = count = 0
        for first in range(0, self.documents, 2**16):
            lines = self.lines(first, min(self.documents, first + 2**16))
            crc = zlib.crc32(b"".join(line + b"\n" for line in lines), crc)
            count += len(lines)
        if crc != self.crc32:
            raise DataError(f"{self.path} has crc32 {crc}, not {self.crc32}. Copy this file again.")


def metadata_path(shard: ShardIndex) -> Path:
    """Return the path of a shard's metadata, if it has any."""
    return shard.bin_path.with_suffix(".jsonl")


def _ends_path(path: Path) -> Path:
    return path.with_name(path.name + ".ends")
