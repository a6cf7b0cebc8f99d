"""What a worker does: one unit of text becomes tokens and records, sorted by shuffling key."""

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep.documents import BadDocument, Document, Unit, read_unit
from megahybrid.data.manifest import sync_folder
from megahybrid.data.tokenizer import Tokenizer, load_tokenizer

# key orders the documents, split decides which are held out; both from the text alone, so that
# copies of a document never lie on both sides. offset and length are in tokens, eod included.
RECORD = np.dtype([("key", "<u8"), ("split", "<u8"), ("offset", "<i8"), ("length", "<i8")])
BATCH_CHARACTERS = 2**20

Records = npt.NDArray[np.void]


@dataclass(frozen=True)
class EncodeJob:
    """What every unit needs."""

    tokenizer: str
    eod: str | None
    text_field: str
    seed: int
    folder: str


@dataclass(frozen=True)
class UnitResult:
    """Counts of one encoded unit."""

    number: int
    bytes: int
    documents: int
    tokens: int
    bad: dict[str, int]


def unit_path(folder: str | Path, number: int, suffix: str) -> Path:
    """Where the parts of an encoded unit lie; `.done` (JSON counts) is written last."""
    return Path(folder) / f"unit-{number:08d}.{suffix}"


def encode_unit(job: EncodeJob, number: int, unit: Unit) -> UnitResult:
    """Encodes a unit into `.tokens`, `.records` and `.bad`; one already done is not done again."""
    done = unit_path(job.folder, number, "done")
    if done.exists():
        return UnitResult(**json.loads(done.read_text()))
    tokenizer = _tokenizer(job.tokenizer, job.eod)
    dtype = np.dtype(tokenizer.info.dtype)
    tokens: list[npt.NDArray[np.integer]] = []
    rows: list[tuple[int, int, int, int]] = []
    bad: list[BadDocument] = []
    position = 0
    for group in _groups(unit, job.text_field, bad):
        for document, ids in zip(
            group, tokenizer.encode([item.text for item in group]), strict=True
        ):
            if tokenizer.info.eod_id in ids:
                bad.append(_bad(document, "eod inside"))
                continue
            ids.append(tokenizer.info.eod_id)
            tokens.append(np.asarray(ids, dtype))
            key, split = _keys(job.seed, document.text)
            rows.append((key, split, position, len(ids)))
            position += len(ids)
    records = np.asarray(rows, RECORD)
    order = np.argsort(records["key"], kind="stable")
    records = records[order]
    records["offset"] = np.cumsum(records["length"]) - records["length"]
    with open(unit_path(job.folder, number, "tokens"), "wb") as file:
        for index in order:
            file.write(tokens[index].data)
    records.tofile(unit_path(job.folder, number, "records"))
    with open(unit_path(job.folder, number, "bad"), "w", encoding="utf-8") as listing:
        for item in bad:
            listing.write(json.dumps(_shown(item), ensure_ascii=False) + "\n")
    counts = dict(sorted(Counter(item.reason for item in bad).items()))
    result = UnitResult(number, unit.bytes, len(records), position, counts)
    temporary = done.with_suffix(".tmp")
    temporary.write_text(json.dumps(result.__dict__))
    os.replace(temporary, done)
    sync_folder(done.parent)
    return result


def _groups(unit: Unit, text_field: str, bad: list[BadDocument]) -> "list[list[Document]]":
    groups: list[list[Document]] = [[]]
    size = 0
    for item in read_unit(unit, text_field):
        if isinstance(item, BadDocument):
            bad.append(item)
            continue
        if size > BATCH_CHARACTERS:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += len(item.text)
    return [group for group in groups if group]


@lru_cache(maxsize=1)
def _tokenizer(path: str, eod: str | None) -> Tokenizer:
    return load_tokenizer(path, eod)


def _keys(seed: int, text: str) -> tuple[int, int]:
    digest = hashlib.blake2b(text.encode(), digest_size=16, key=str(seed).encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _bad(document: Document, reason: str) -> BadDocument:
    file, _, offset = document.name.rpartition(":")
    return BadDocument(file, int(offset), reason, document.text[:80].encode())


def _shown(item: BadDocument) -> dict[str, object]:
    return {
        "file": item.file,
        "offset": item.offset,
        "reason": item.reason,
        "beginning": item.beginning.decode("utf-8", "backslashreplace"),
    }
