"""One rank's safetensors file: written, checksummed on the way, and read back."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megahybrid.checkpoint import durable
from megahybrid.checkpoint.fragments import Fragment, as_numpy
from megahybrid.checkpoint.manifest import ELEMENT_BYTES, FileRecord


class RankFile:
    """One rank's file of a save.

    The header is known before the first byte is written, so nothing is ever moved or patched.
    """

    def __init__(self, fragments: Sequence[Fragment], rank: int) -> None:
        self.name = f"fragments-{rank:04d}.safetensors"
        self.fragments = [part for part in fragments if part.flat[0] < part.flat[1]]
        self.keys = [
            f"{part.state}/{part.tensor}/{index}" for index, part in enumerate(self.fragments)
        ]
        header: dict[str, Any] = {}
        offset = 0
        for key, part in zip(self.keys, self.fragments, strict=True):
            count = part.flat[1] - part.flat[0]
            end = offset + count * ELEMENT_BYTES
            header[key] = {"dtype": "F32", "shape": [count], "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        # The format lets a header end in spaces; the data then begins at a multiple of 8.
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.bytes = len(self.header) + offset if self.fragments else 0
        self._record: FileRecord | None = None

    def write(self, folder: Path) -> dict[str, Any] | None:
        """Write the file; returns its records, JSON-able, or None when empty. Raises OSError."""
        if not self.fragments:
            return None
        record = self._record = durable.write(folder / self.name, self._chunks())
        table = [
            {"tensor": part.tensor, "state": part.state, "box": part.box, "flat": part.flat,
             "file": self.name, "key": key}
            for key, part in zip(self.keys, self.fragments, strict=True)
        ]  # fmt: skip
        return {"name": self.name, "fragments": table, **record.model_dump()}

    def damage(self, folder: Path) -> str | None:
        """Return what reading the file back finds wrong, or None. Raises OSError."""
        if self._record is None:
            return None
        durable.drop_page_cache(folder / self.name)
        bad = durable.damaged_blocks(folder / self.name, self._record)
        return f"block {bad[0]} of {self.name} reads back differently" if bad else None

    def _chunks(self) -> Iterator[memoryview]:
        yield memoryview(self.header)
        for part in self.fragments:
            yield as_numpy(part.data).view(np.uint8).data
