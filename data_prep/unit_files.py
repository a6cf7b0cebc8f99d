"""The files of one encoded unit: its tokens and records, in runs sorted by key, and its counts."""

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megahybrid.data.manifest import sync_folder
from megahybrid.data_prep.items import BadDocument
from megahybrid.data_prep.loss import Loss

# key orders the documents, split decides which are held out; both from the text alone, so that
# copies of a document never lie on both sides. offset and length are in tokens, eod included.
# note, note_length: where in `.notes` the kept fields of the document's row lie, and their bytes.
RECORD = np.dtype(
    [
        ("key", "<u8"),
        ("split", "<u8"),
        ("offset", "<i8"),
        ("length", "<i8"),
        ("note", "<i8"),
        ("note_length", "<i4"),
    ]
)
RUN_BYTES = 64 * 2**20  # of tokens held by a worker before they are sorted and written

NO_LOSS = Loss()
Records = npt.NDArray[np.void]


@dataclass(frozen=True)
class UnitResult:
    """Counts of one encoded unit. `runs`: records of each sorted run, in the files' order."""

    number: int
    bytes: int
    documents: int
    tokens: int
    runs: list[int]
    bad: dict[str, int]
    kept: dict[str, int] = field(default_factory=dict)  # rows that had each field to be kept
    loss: Loss = NO_LOSS


def unit_path(folder: str | Path, number: int, suffix: str) -> Path:
    """Return the path of one part of an encoded unit; `.done` (JSON counts) is written last."""
    return Path(folder) / f"unit-{number:08d}.{suffix}"


def read_result(folder: str | Path, number: int) -> UnitResult | None:
    """Return the result of a unit that is done; None for one that is not."""
    try:
        stored = json.loads(unit_path(folder, number, "done").read_bytes())
    except FileNotFoundError:
        return None
    return UnitResult(**stored | {"loss": Loss(**stored["loss"])})


class RunWriter:
    """The files of one unit: runs of documents, each sorted by key, one after another."""

    def __init__(
        self, folder: str | Path, number: int, dtype: np.dtype[Any], *, has_counts: bool = False
    ) -> None:
        """Make the files. has_counts: documents come with whether each token is a target."""
        self.folder, self.number, self.dtype = folder, number, dtype
        self._counts = open(unit_path(folder, number, "counts"), "wb") if has_counts else None  # noqa: SIM115
        self._tokens = open(unit_path(folder, number, "tokens"), "wb")  # noqa: SIM115
        self._records = open(unit_path(folder, number, "records"), "wb")  # noqa: SIM115
        self._metadata = open(unit_path(folder, number, "notes"), "wb")  # noqa: SIM115
        self._held: list[npt.NDArray[Any]] = []
        self._held_counts: list[npt.NDArray[np.bool_]] = []
        self._held_metadata: list[bytes] = []
        self._rows: list[tuple[int, int, int, int, int, int]] = []
        self._held_tokens = self._written = self._written_metadata = self._held_bytes = 0
        self._runs: list[int] = []

    def add(
        self,
        tokens: npt.NDArray[Any],
        keys: tuple[int, int],
        metadata: bytes = b"",
        counts: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Add a document, eod included, and the kept fields of its row.

        `counts`, where the unit has them, says of each token whether it is a target.
        """
        assert (counts is None) == (self._counts is None)
        self._held.append(tokens)
        if counts is not None:
            self._held_counts.append(counts)
            self._held_bytes += len(counts)
        self._held_metadata.append(metadata)
        self._rows.append((*keys, 0, len(tokens), 0, len(metadata)))
        self._held_tokens += len(tokens)
        # Beside the tokens, an array and a row cost about 300 bytes each.
        self._held_bytes += len(tokens) * self.dtype.itemsize + len(metadata) + 300
        if self._held_bytes > RUN_BYTES:
            self._write_run()

    def _write_run(self) -> None:
        if not self._rows:
            return
        records = np.asarray(self._rows, RECORD)
        order = np.argsort(records["key"], kind="stable")
        records = records[order]
        records["offset"] = self._written + np.cumsum(records["length"]) - records["length"]
        self._tokens.writelines(self._held[index].data for index in order)
        if self._counts is not None:
            self._counts.writelines(self._held_counts[index].data for index in order)
        self._written += self._held_tokens
        metadata_lines = np.cumsum(records["note_length"], dtype=np.int64)
        records["note"] = self._written_metadata + metadata_lines - records["note_length"]
        self._metadata.writelines(self._held_metadata[index] for index in order)
        self._written_metadata += int(metadata_lines[-1])
        self._records.write(records.tobytes())
        self._runs.append(len(records))
        self._held, self._held_counts, self._held_metadata, self._rows = [], [], [], []
        self._held_tokens = self._held_bytes = 0

    def begin_long(self) -> int:
        """Begin a document that is written piece by piece; returns where it begins."""
        self._write_run()
        return self._written

    def add_piece(
        self, tokens: npt.NDArray[Any], counts: npt.NDArray[np.bool_] | None = None
    ) -> None:
        """Add a piece to the document that was begun; counts: as in `add`."""
        assert (counts is None) == (self._counts is None)
        self._tokens.write(tokens.data)
        if self._counts is not None and counts is not None:
            self._counts.write(counts.data)
        self._written += len(tokens)

    def drop_long(self, begin: int) -> None:
        """Drop the document that was begun."""
        self._tokens.seek(begin * self.dtype.itemsize)
        self._tokens.truncate()
        self._written = begin

    def end_long(self, begin: int, keys: tuple[int, int], metadata: bytes = b"") -> None:
        """End the document that was begun: it is a run of its own."""
        row = [(*keys, begin, self._written - begin, self._written_metadata, len(metadata))]
        self._metadata.write(metadata)
        self._written_metadata += len(metadata)
        self._records.write(np.asarray(row, RECORD).tobytes())
        self._runs.append(1)

    def finish(
        self,
        size: int,
        bad: list[BadDocument],
        kept: dict[str, int] | None = None,
        loss: Loss = NO_LOSS,
    ) -> UnitResult:
        """Makes the unit durable and marks it done: `.done` gets its name once all the rest is."""
        self._write_run()
        counts = dict(sorted(Counter(item.reason for item in bad).items()))
        written = (sum(self._runs), self._written, self._runs)
        result = UnitResult(self.number, size, *written, counts, kept or {}, loss)
        done = unit_path(self.folder, self.number, "done")
        unnamed = done.with_suffix(".done.tmp")
        with (
            open(unit_path(self.folder, self.number, "bad"), "wb") as listing,
            open(unnamed, "wb") as stored,
        ):
            for item in bad:
                listing.write(json.dumps(_shown(item), ensure_ascii=False).encode() + b"\n")
            stored.write(json.dumps(asdict(result)).encode())
            files = (listing, stored, self._tokens, self._records, self._metadata, self._counts)
            for file in files:
                if file is not None and file.tell():
                    file.flush()
                    os.fsync(file.fileno())
        sync_folder(Path(self.folder))
        os.replace(unnamed, done)
        return result

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._tokens.close()
        self._records.close()
        self._metadata.close()
        if self._counts is not None:
            self._counts.close()


def _shown(item: BadDocument) -> dict[str, object]:
    return {
        "file": item.file,
        "offset": item.offset,
        "reason": item.reason,
        "lost": round(item.size),
        "beginning": item.beginning.decode("utf-8", "backslashreplace"),
    }
