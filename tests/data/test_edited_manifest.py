"""Manifests that somebody edited, or an older version wrote."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megahybrid.data.dataset import TokenDataset
from megahybrid.data.manifest import MANIFEST_NAME, read_manifest
from megahybrid.errors import DataError, MegahybridError
from tests.data.corpus import write_corpus

LENGTHS = [5, 1, 30, 7, 64, 2, 9, 200, 3]


@given(st.text(max_size=50) | st.recursive(st.none() | st.integers() | st.text(), st.lists))
def test_any_manifest_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: object
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    text = content if isinstance(content, str) else json.dumps({"format": content})
    (folder / MANIFEST_NAME).write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(DataError):
        read_manifest(folder)


YESTERDAY = """{
 "format": "megahybrid-tokens",
 "version": 1,
 "tokenizer": {
  "kind": "sentencepiece",
  "sha256": "abababababababababababababababababababababababababababababababab",
  "vocab_size": 1000,
  "eod_id": 1
 },
 "dtype": "uint16",
 "documents": 3,
 "tokens": 53,
 "length_histogram": [
  {
   "min_tokens": 2,
   "documents": 1,
   "tokens": 3
  },
  {
   "min_tokens": 16,
   "documents": 2,
   "tokens": 50
  }
 ],
 "shards": [
  {
   "bin": "shard-00000.bin",
   "idx": "shard-00000.idx",
   "documents": 3,
   "tokens": 53,
   "bytes": 106,
   "block_bytes": 64,
   "crc32": [
    4261772172,
    1016173013
   ]
  }
 ],
 "sources": [],
 "command": ""
}
"""


def edited(folder: Path, *where: str | int, to: object) -> None:
    """Writes the manifest anew with one value in another's place."""
    path = folder / MANIFEST_NAME
    value = here = json.loads(path.read_text())
    for step in where[:-1]:
        here = here[step]
    here[where[-1]] = to
    path.write_text(json.dumps(value))


WRONG = [-1, 10**30, 2**63, 1.0, 1.5, True, "5", None, [], {}, "x" * 10**6, [1] * 10**5]
PLACES = [
    *("documents", "tokens"),
    *(("tokenizer", name) for name in ("vocab_size", "eod_id")),
    *(("shards", 0, name) for name in ("documents", "tokens", "bytes", "block_bytes")),
    *(("length_histogram", 0, name) for name in ("min_tokens", "documents", "tokens")),
    *(("shards", 0, "crc32", 0), ("shards", 0, "mask_crc32"), ("shards", 0, "notes_crc32")),
]


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_number_that_none_can_be_is_one_short_line(tmp_path: Path, place: object) -> None:
    write_corpus(tmp_path, LENGTHS)
    where = place if isinstance(place, tuple) else (place,)
    whole = (tmp_path / MANIFEST_NAME).read_text()
    for value in WRONG:
        if value is None and str(where[-1]).endswith("_crc32"):
            continue  # as good as not there
        (tmp_path / MANIFEST_NAME).write_text(whole)
        edited(tmp_path, *where, to=value)
        with pytest.raises(DataError, match=r"manifest.json: \S+=") as told:
            TokenDataset(tmp_path)
        line = str(told.value)
        assert "\n" not in line and len(line) < 400 + len(str(tmp_path))


PARTS: list[tuple[tuple[str | int, ...], object, str]] = [
    (("shards", 0, "bin"), "../shard-00000.bin", r"shards.0.bin=../shard-00000.bin is not a plain"),
    (("shards", 0, "idx"), "/etc/passwd", r"shards.0.idx=/etc/passwd is not a plain file name"),
    (("shards", 0, "bin"), "..", r"shards.0.bin=.. is not a plain file name"),
    (("shards", 0, "bin"), "a\0b", r"shards.0.bin=a\\x00b is not a plain file name"),
    (("shards", 0, "bin"), "a\x1b[31m", r"bin=a\\x1b\[31m is not a plain file name"),
    (("shards", 0, "bin"), "n" * 300, r"holds shard-00000.bin, which its manifest.json does not"),
    (("shards", 1, "bin"), "shard-00000.bin", r"shards=3 entries name shard-00000.bin twice"),
    (("shards", 0), 5, r"shards.0=5 is not a mapping"),
    (("shards",), {"a": 1}, r"shards=\{a: 1\} is not a list"),
    (("tokenizer",), [], r"tokenizer=\[\] is not a mapping"),
    (("tokenizer", "eod_id"), 1000, r"tokenizer.eod_id=1000 is beyond vocab_size=1000"),
    (("tokenizer", "vocab_size"), 2**31 + 1, r"tokenizer.vocab_size=2147483649 is more than"),
    (("dtype",), "int32", r"dtype=int32 is not uint16 \(tokenizer.vocab_size=1000\)"),
    (("format",), "other", r"format=other is not one of megahybrid-tokens"),
    (("version",), 2, r"version=2 is not one of 1"),
    (("documents",), 6, r"documents=6 is not 5 \(sum over shards\)"),
    (("length_histogram",), [], r"documents=5 is not 0 \(sum over length_histogram\)"),
    (("sources",), [1], r"sources.0=1 is not a mapping"),
    (("shards", 0, "crc32"), [0] * 10**5, r"crc32=100000 checksums are not one per block"),
    (("shards", 0, "mask_crc"), 1, r"shards.0.mask_crc is not a field"),
]


@pytest.mark.parametrize("where, value, words", PARTS, ids=[str(part[0]) for part in PARTS])
def test_edited_manifest_is_told_by_its_field(
    tmp_path: Path, where: tuple[str | int, ...], value: object, words: str
) -> None:
    write_corpus(tmp_path, [20, 30, 3, 50, 40], shard_tokens=60)
    edited(tmp_path, *where, to=value)
    with pytest.raises(DataError, match=words) as told:
        TokenDataset(tmp_path)
    assert "\n" not in str(told.value)


def test_manifest_without_format_or_of_no_plain_file_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path, LENGTHS)
    path = tmp_path / MANIFEST_NAME
    value = json.loads(path.read_text())
    del value["format"]
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match="has no format and version"):
        TokenDataset(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(MegahybridError, match="manifest.json is a pipe, not a plain file"):
        TokenDataset(tmp_path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(MegahybridError, match="manifest.json is a device, not a plain file"):
        TokenDataset(tmp_path)


def test_manifest_of_yesterday_is_read_and_written_with_the_same_bytes(tmp_path: Path) -> None:
    """Its sha256 is the dataset's fingerprint in every checkpoint."""
    write_corpus(tmp_path, [20, 30, 3])
    (tmp_path / MANIFEST_NAME).write_text(YESTERDAY)
    manifest, fingerprint = read_manifest(tmp_path)
    assert manifest.dump() == YESTERDAY
    assert fingerprint == ("f549bdfd8b5d41b4bdc289b66ee89199aac4dd085ff0881f18e7914766f8d6ac")
    assert TokenDataset(tmp_path).fingerprint == fingerprint
    (tmp_path / "again").mkdir()
    write_corpus(tmp_path / "again", [20, 30, 3])
    assert (tmp_path / "again" / MANIFEST_NAME).read_text() == YESTERDAY
