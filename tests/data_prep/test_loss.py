"""What is lost of a damaged input is said as a share of its bytes, whatever it is packed in."""

import gzip
import io
import json
import os
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megahybrid.data_prep import inputs as inputs_module
from megahybrid.data_prep import plain_text
from megahybrid.data_prep.documents import BadDocument, BadText, Document, LongDocument, read_unit
from megahybrid.data_prep.inputs import cut_units
from megahybrid.data_prep.items import EMPTY, Fields
from megahybrid.data_prep.loss import Loss, loss_of, refuse_loss
from megahybrid.data_prep.tokenize import tokenize
from megahybrid.errors import DataError
from tests.data_prep.reading import files_of

DRAW = random.Random(5)
TEXTS = [f"{n} " + "".join(DRAW.choices("abcdefgh \n", k=200)) for n in range(400)]
LINES = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
PARTS = [b"".join(LINES[begin : begin + 40]) for begin in range(0, 400, 40)]


def zstd(raw: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    return zstandard.ZstdCompressor(write_checksum=True).compress(raw)


def tarred(files: dict[str, bytes]) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return held.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return held.getvalue()


def parquet(field: str = "text") -> bytes:
    arrow, tables = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    held = io.BytesIO()
    tables.write_table(arrow.table({field: TEXTS}), held, row_group_size=40, compression="gzip")
    return held.getvalue()


def members(pack: Callable[[bytes], bytes] = bytes, suffix: str = "") -> dict[str, bytes]:
    return {f"{n}.jsonl{suffix}": pack(part) for n, part in enumerate(PARTS)}


# Ten equal parts each, of which damage costs one at the most.
CONTAINERS: dict[str, Callable[[], bytes]] = {
    "a.jsonl": lambda: b"".join(PARTS),
    "a.json": lambda: b"[" + b",".join(line.strip() for line in LINES) + b"]",
    "a.json.gz": lambda: b"".join(map(gzip.compress, PARTS)),
    "a.jsonl.zst": lambda: b"".join(map(zstd, PARTS)),
    "a.tar": lambda: tarred(members()),
    "packed.tar": lambda: tarred(members(gzip.compress, ".gz")),
    "a.zip": lambda: zipped(members()),
    "packed.zip": lambda: zipped(members(zstd, ".zst")),
    "a.parquet": parquet,
}


def read(path: Path, fields: Fields | None = None) -> tuple[list[str], list[BadDocument], Loss]:
    """Texts, what is bad, and the loss, of everything in a file."""
    texts, bad, empty, size = [], [], 0, 0
    for unit in cut_units(files_of(path)):
        size += unit.bytes
        for item in read_unit(unit, *([fields] if fields else [])):
            if isinstance(item, Document):
                texts.append(item.text)
            elif isinstance(item, LongDocument):
                try:
                    texts.append("".join(item.pieces))
                except BadText as error:
                    bad.append(BadDocument(item.name, 0, str(error), b"", item.size, error.absent))
            elif item.reason == EMPTY:
                empty += 1
            else:
                bad.append(item)
    return texts, bad, loss_of(size, None, bad, empty)


@pytest.mark.parametrize("name", CONTAINERS)
def test_whole_container_loses_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(CONTAINERS[name]())
    texts, bad, loss = read(tmp_path / name)
    assert (texts, bad, loss.lost_bytes) == (TEXTS, [], 0)
    size = (tmp_path / name).stat().st_size
    assert 0.9 * size < loss.bytes <= size


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("place", [0.13, 0.47, 0.55, 0.82])
def test_flipped_byte_costs_what_is_missing_and_says_so(
    tmp_path: Path, name: str, place: float
) -> None:
    raw = bytearray(CONTAINERS[name]())
    for index in range(3):  # in a text, one alone may make another letter
        raw[int(place * len(raw)) + index] ^= 0x80
    (tmp_path / name).write_bytes(raw)
    texts, bad, loss = read(tmp_path / name)
    missing = len(set(TEXTS) - set(texts)) / len(TEXTS)
    assert bad and 0 < missing <= 0.11 and set(texts) <= set(TEXTS)
    # An archive's headers and its end are bytes as well.
    assert loss.fraction == pytest.approx(missing, abs=0.03)


@pytest.mark.parametrize("name", ["a.json.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("place", [0, 1, 12, 40, 900])
def test_packed_file_with_a_broken_beginning_gives_the_rest(
    tmp_path: Path, name: str, place: int
) -> None:
    raw = bytearray(CONTAINERS[name]())
    raw[place] ^= 0x55
    (tmp_path / name).write_bytes(raw)
    texts, bad, loss = read(tmp_path / name)
    assert texts == TEXTS[40:] and len(bad) == 1
    assert loss.fraction == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("kept", [0.35, 0.75])
def test_truncated_tail_is_told(tmp_path: Path, name: str, kept: float) -> None:
    raw = CONTAINERS[name]()
    (tmp_path / name).write_bytes(raw[: int(kept * len(raw))])
    texts, bad, loss = read(tmp_path / name)
    assert bad and len(texts) < len(TEXTS)
    if name == "a.parquet":  # its directory stands at its end
        assert texts == [] and loss.fraction == 1
    else:
        assert texts == TEXTS[: len(texts)] and len(texts) / len(TEXTS) > kept - 0.12
        assert loss.fraction < 0.4


def test_size_that_a_header_names_is_lost_with_the_tail(tmp_path: Path) -> None:
    raw = tarred({"a.jsonl": b"".join(PARTS)})
    (tmp_path / "a.tar").write_bytes(raw[: len(raw) // 4])
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(raw[: len(raw) // 4]))
    for name in ("a.tar", "a.tar.gz"):
        texts, _, loss = read(tmp_path / name)
        missing = 1 - len(texts) / len(TEXTS)
        assert missing > 0.7 and loss.fraction == pytest.approx(missing, abs=0.03)
    packed = zstd(b"".join(PARTS) * 20)
    (tmp_path / "a.jsonl.zst").write_bytes(packed[: len(packed) // 2])
    texts, _, loss = read(tmp_path / "a.jsonl.zst")
    missing = 1 - len(texts) / len(TEXTS) / 20
    assert missing > 0.1 and loss.fraction == pytest.approx(missing, abs=0.03)


def test_single_gzip_member_with_a_flipped_byte_is_lost_whole(tmp_path: Path) -> None:
    raw = bytearray(gzip.compress(b"".join(PARTS)))
    raw[len(raw) // 2] ^= 4
    for name in ("a.jsonl.gz", "a.txt.gz", "a.json.gz"):
        (tmp_path / name).write_bytes(raw)
        texts, _, loss = read(tmp_path / name)
        assert texts == [] and loss.lost_bytes == loss.bytes == len(raw)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.tar", "packed.zip", "a.parquet"])
def test_rows_without_the_field_are_lost(tmp_path: Path, name: str) -> None:
    other = parquet("raw_content") if name == "a.parquet" else CONTAINERS[name]()
    (tmp_path / name).write_bytes(other)
    fields = None if name == "a.parquet" else Fields("raw_content")
    texts, bad, loss = read(tmp_path / name, fields)
    assert texts == [] and "no text field" in bad[0].reason
    assert loss.fraction > 0.9


@pytest.mark.parametrize("name", CONTAINERS)
def test_file_that_can_not_be_read_is_lost_whole(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(CONTAINERS[name]())
    units = list(cut_units(files_of(tmp_path / name)))
    (tmp_path / name).unlink()
    bad = [item for unit in units for item in read_unit(unit)]
    size = sum(unit.bytes for unit in units)
    loss = loss_of(size, None, [item for item in bad if isinstance(item, BadDocument)], 0)
    assert loss.fraction == 1 and not any(isinstance(item, Document) for item in bad)


def test_file_that_has_become_shorter_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(PARTS))
    (unit,) = cut_units(files_of(path))
    os.truncate(path, len(b"".join(PARTS[:6])))
    items = list(read_unit(unit))
    assert len(items) == 241 and isinstance(items[-1], BadDocument)
    assert items[-1].size == len(b"".join(PARTS[6:])) and "changed" in items[-1].reason


class Failing(io.RawIOBase):
    """A disk that gives no more from some byte on."""

    def __init__(self, path: str) -> None:
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.file.tell() >= 40_000:
            raise OSError(5, "Input/output error")
        return self.file.readinto(memoryview(buffer)[:8192])


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize("long", [True, False])
def test_disk_that_fails_loses_the_rest(
    tmp_path: Path, name: str, long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megahybrid.data_prep import documents

    path = tmp_path / name
    path.write_bytes(b"".join(PARTS) if name == "a.jsonl" else " ".join(TEXTS).encode())
    if long and name == "a.txt":
        monkeypatch.setattr(plain_text, "LONG_BYTES", 10_000)
        monkeypatch.setattr(plain_text, "CHUNK_BYTES", 10_000)
    (unit,) = cut_units(files_of(path))
    monkeypatch.setattr(
        documents, "open", lambda name, _: io.BufferedReader(Failing(name)), raising=False
    )
    monkeypatch.setattr(inputs_module, "identify", None)
    known = lost = 0.0
    for item in read_unit(unit):
        if isinstance(item, LongDocument):
            with pytest.raises(BadText, match="unreadable: Input/output error"):
                list(item.pieces)
            lost += item.size
        elif isinstance(item, BadDocument):
            assert item.reason == "unreadable: Input/output error"
            lost += item.size
        else:
            known += item.size
    assert known + lost == unit.bytes and lost >= unit.bytes - 50_000


def test_members_that_are_no_text_are_lost_with_their_bytes(tmp_path: Path) -> None:
    image = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40
    files = {"a.jsonl": PARTS[0], "b.png": image, "c.json": b'{\n "version": 1\n}\n'}
    for name, raw in (("a.tar", tarred(files)), ("a.zip", zipped(files))):
        (tmp_path / name).write_bytes(raw)
        texts, bad, _ = read(tmp_path / name)
        assert texts == TEXTS[:40]
        assert [item.reason for item in bad] == ["image", "JSON that is not a list of documents"]
    (tmp_path / "a.tar").write_bytes(tarred(files))
    assert [round(item.size) for item in read(tmp_path / "a.tar")[1]] == [512 + 10_752, 1024]


def test_nine_of_ten_broken_files_are_refused(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number, part in enumerate(PARTS):
        raw = bytearray(gzip.compress(part))
        if number:
            raw[len(raw) // 2] ^= 8
        (folder / f"{number}.json.gz").write_bytes(raw)
    with pytest.raises(DataError, match=r"what is lost.*: (89|9\d)\.\d\d% .*9 broken gzip member"):
        tokenize([folder], model, tmp_path / "out", quiet=True)
    report = tokenize([folder], model, tmp_path / "out", quiet=True, max_bad_fraction=0.95)
    assert report.documents == {"train": 40} and 0.88 < report.loss.fraction < 0.92
    again = tokenize([folder], model, tmp_path / "out", quiet=True, max_bad_fraction=0.95)
    assert again == report


def test_one_broken_file_of_many_is_no_reason_to_stop(model: Path, tmp_path: Path) -> None:
    """However early it comes: what is lost is weighed against all that there is."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "0.txt").write_bytes(b"\xff" * 900)
    for number, part in enumerate(PARTS):
        (folder / f"a{number}.jsonl").write_bytes(part)
    report = tokenize([folder], model, tmp_path / "out", quiet=True)
    assert report.loss.lost_bytes == 900 and report.bad == {"broken utf-8": 1}


def test_two_tables_of_which_one_names_its_column_otherwise(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet())
    (tmp_path / "b.parquet").write_bytes(parquet("raw_content"))
    with pytest.raises(DataError, match=r"what is lost.*: (49|50)\..*Correct --field"):
        tokenize([tmp_path / "*.parquet"], model, tmp_path / "out", quiet=True)


def test_empty_rows_are_counted_and_no_loss(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(LINES[:60]) + b'{"text": ""}\n{"text": " \\n"}\n' * 15)
    report = tokenize([path], model, tmp_path / "out", quiet=True, max_bad_fraction=0)
    assert report.documents == {"train": 60} and report.bad == {}
    assert report.loss.empty == 30 and report.loss.fraction == 0
    assert not (tmp_path / "out/quarantine.jsonl").exists()
    path.write_bytes(b'{"text": ""}\n')
    with pytest.raises(DataError, match="hold no document \\(1 empty\\)"):
        tokenize([path], model, tmp_path / "other", quiet=True)


def test_rows_of_a_hub_dataset_are_weighed_as_rows(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    rows = [{"text": text} for text in TEXTS[:80]] + [{"text": None}] * 20
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = f"hf:json?data_files={tmp_path}/a.jsonl"
    with pytest.raises(DataError, match=r"20\.00% \(20 of 100\) of the rows"):
        tokenize([given], model, tmp_path / "out", quiet=True)
    report = tokenize([given], model, tmp_path / "out", quiet=True, max_bad_fraction=0.2)
    assert report.loss == Loss(rows=100, lost_rows=20)


@settings(max_examples=60, deadline=None)
@given(
    flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), min_size=1, max_size=6),
    name=st.sampled_from(["a.jsonl", "a.json.gz", "a.tar", "a.zip", "a.parquet", "a.json"]),
)
def test_what_is_missing_is_never_more_than_what_is_said(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[float, int]], name: str
) -> None:
    raw = bytearray(CONTAINERS[name]())
    for place, flip in flips:
        raw[int(place * len(raw))] ^= flip
    path = tmp_path_factory.mktemp("flip") / name
    path.write_bytes(raw)
    try:
        texts, bad, loss = read(path)
    except DataError as error:  # an array without its bracket is left out as a whole
        assert name == "a.json" and "not a list of documents" in str(error)
        return
    # A flipped letter makes another text where nothing has a checksum: it is there, if wrong.
    missing = max(0.0, 1 - len(texts) / len(TEXTS))
    assert loss.fraction >= 0.8 * missing - 0.01, (missing, bad)
    assert loss.fraction <= 1


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 9)), max_size=20),
    st.floats(0, 1),
)
def test_work_is_stopped_early_only_where_the_end_would_be_refused(
    parts: list[tuple[int, int, int]], limit: float
) -> None:
    units = [
        loss_of(size, None, [BadDocument("", 0, "", b"", min(lost, size) + away, away)], 0)
        for size, lost, away in parts
    ]
    on_disk = sum(size for size, _, _ in parts)
    whole = sum(units, Loss())
    for stop in range(len(units)):
        if sum(units[:stop], Loss()).is_sure_to_exceed(limit, on_disk):
            with pytest.raises(DataError):
                refuse_loss({}, whole, limit, "")
