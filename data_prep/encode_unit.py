"""The work of one worker: a unit of text becomes tokens and records, in runs sorted by key."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megahybrid.data.manifest import sync_folder
from megahybrid.data.tokenizer import Tokenizer, load_tokenizer
from megahybrid.data_prep.documents import BadDocument, BadText, Document, LongDocument, read_unit
from megahybrid.data_prep.inputs import Unit
from megahybrid.data_prep.items import EMPTY, Fields
from megahybrid.data_prep.long_text import encode_pieces, slices
from megahybrid.data_prep.loss import Loss, loss_of

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
BATCH_CHARACTERS = 2**20
LONG_CHARACTERS = 4 * 2**20  # from here on a text is encoded in pieces
RUN_BYTES = 64 * 2**20  # of tokens held by a worker before they are sorted and written

NO_LOSS = Loss()
Records = npt.NDArray[np.void]


@dataclass(frozen=True)
class EncodeJob:
    """The settings that every unit needs.

    threads: of the tokenizer, where one unit is all the work.
    """

    tokenizer: str
    eod: str | None
    text_field: str
    seed: int
    folder: str
    threads: int = 1
    kept: tuple[str, ...] = ()
    format: str = "auto"


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


def encode_unit(job: EncodeJob, number: int, unit: Unit) -> UnitResult:
    """Encodes a unit into `.tokens`, `.records` and `.bad`; one already done is not done again."""
    if (done := read_result(job.folder, number)) is not None:
        return done
    tokenizer = _tokenizer(job.tokenizer, job.eod, job.threads)
    fields = Fields(job.text_field, job.kept, format=job.format)
    with RunWriter(job.folder, number, np.dtype(tokenizer.info.dtype)) as writer:
        encoder = _Encoder(job.seed, tokenizer, writer)
        size = 0.0
        for item in read_unit(unit, fields):
            size += item.size
            if isinstance(item, BadDocument):
                encoder.leave_out(item)
            elif isinstance(item, LongDocument):
                encoder.add_long(item)
            elif len(item.text) >= LONG_CHARACTERS:
                encoder.add_long(
                    LongDocument(item.name, slices(item.text), item.metadata, item.size)
                )
            else:
                encoder.add(item)
        encoder.flush()
        rows = round(size) if unit.of_rows else None
        loss = loss_of(unit.bytes, rows, encoder.bad, encoder.empty)
        return writer.finish(unit.bytes, encoder.bad, dict(fields.found), loss)


class _Encoder:
    """The encoder of one unit: documents go in and are encoded in batches.

    `bad`: the documents that were left out; `empty`: how many had no text.
    """

    def __init__(self, seed: int, tokenizer: Tokenizer, writer: "RunWriter") -> None:
        self.seed, self.tokenizer, self.writer = seed, tokenizer, writer
        self.bad: list[BadDocument] = []
        self.empty = 0
        self.eod = tokenizer.info.eod_id
        self.end = np.asarray([self.eod], writer.dtype)
        self.waiting: list[Document] = []
        self.characters = 0

    def leave_out(self, item: BadDocument) -> None:
        """Count an item that is no document."""
        if item.reason == EMPTY:
            self.empty += 1
        else:
            self.bad.append(item)

    def add(self, document: Document) -> None:
        self.waiting.append(document)
        self.characters += len(document.text)
        if self.characters >= BATCH_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        waiting, self.waiting, self.characters = self.waiting, [], 0
        if not waiting:
            return
        for document, ids in zip(
            waiting, self.tokenizer.encode_arrays([item.text for item in waiting]), strict=True
        ):
            if (ids == self.eod).any():
                self.leave_out(_bad(document, "eod inside", document.text[:80]))
                continue
            digest = document_hash(self.seed)
            digest.update(document.text.encode())
            tokens = np.concatenate((ids, self.end))
            self.writer.add(tokens, document_keys(digest), document.metadata)

    def add_long(self, document: LongDocument) -> None:
        """Encodes a document piece by piece, straight to disk; takes it back if it is bad."""
        self.flush()
        digest = document_hash(self.seed)

        def hashed() -> Iterable[str]:
            for piece in document.pieces:
                digest.update(piece.encode())
                yield piece

        begin = self.writer.begin_long()
        try:
            for ids in encode_pieces(self.tokenizer, hashed()):
                if (ids == self.eod).any():
                    raise BadText("eod inside")
                self.writer.add_piece(ids)
        except (BadText, UnicodeEncodeError) as error:
            reason = str(error) if isinstance(error, BadText) else "lone surrogate"
            self.writer.drop_long(begin)
            absent = error.absent if isinstance(error, BadText) else 0.0
            self.leave_out(replace(_bad(document, reason, ""), absent=absent))
            return
        self.writer.add_piece(self.end)
        self.writer.end_long(begin, document_keys(digest), document.metadata)


class RunWriter:
    """The files of one unit: runs of documents, each sorted by key, one after another."""

    def __init__(self, folder: str | Path, number: int, dtype: np.dtype[Any]) -> None:
        self.folder, self.number, self.dtype = folder, number, dtype
        self._tokens = open(unit_path(folder, number, "tokens"), "wb")  # noqa: SIM115
        self._records = open(unit_path(folder, number, "records"), "wb")  # noqa: SIM115
        self._metadata = open(unit_path(folder, number, "notes"), "wb")  # noqa: SIM115
        self._held: list[npt.NDArray[Any]] = []
        self._held_metadata: list[bytes] = []
        self._rows: list[tuple[int, int, int, int, int, int]] = []
        self._held_tokens = self._written = self._written_metadata = self._held_bytes = 0
        self._runs: list[int] = []

    def add(self, tokens: npt.NDArray[Any], keys: tuple[int, int], metadata: bytes = b"") -> None:
        """Add a document, eod included, and the kept fields of its row."""
        self._held.append(tokens)
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
        self._written += self._held_tokens
        metadata_lines = np.cumsum(records["note_length"], dtype=np.int64)
        records["note"] = self._written_metadata + metadata_lines - records["note_length"]
        self._metadata.writelines(self._held_metadata[index] for index in order)
        self._written_metadata += int(metadata_lines[-1])
        self._records.write(records.tobytes())
        self._runs.append(len(records))
        self._held, self._held_metadata, self._rows = [], [], []
        self._held_tokens = self._held_bytes = 0

    def begin_long(self) -> int:
        """Begin a document that is written piece by piece; returns where it begins."""
        self._write_run()
        return self._written

    def add_piece(self, tokens: npt.NDArray[Any]) -> None:
        """Add a piece to the document that was begun."""
        self._tokens.write(tokens.data)
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
            for file in (listing, stored, self._tokens, self._records, self._metadata):
                if file.tell():
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


@lru_cache(maxsize=1)
def _tokenizer(path: str, eod: str | None, threads: int) -> Tokenizer:
    return load_tokenizer(path, eod, threads)


def document_hash(seed: int) -> hashlib.blake2b:
    """The keyed hash that a document's content is fed to."""
    return hashlib.blake2b(digest_size=16, key=str(seed).encode())


def document_keys(digest: hashlib.blake2b) -> tuple[int, int]:
    """Key and split of a document."""
    raw = digest.digest()
    return int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")


def _bad(document: Document | LongDocument, reason: str, beginning: str) -> BadDocument:
    file, _, offset = document.name.rpartition(":")
    return BadDocument(file, int(offset), reason, beginning.encode(), document.size)


def _shown(item: BadDocument) -> dict[str, object]:
    return {
        "file": item.file,
        "offset": item.offset,
        "reason": item.reason,
        "lost": round(item.size),
        "beginning": item.beginning.decode("utf-8", "backslashreplace"),
    }
