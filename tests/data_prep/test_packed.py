"""Inputs that are packed or tables: gzip members, zstd frames, parquet row groups."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megahybrid.data_prep import compressed, plain_text
from megahybrid.data_prep.compressed import open_stretch, packing_by_name, scan
from megahybrid.data_prep.documents import BadDocument, Document, LongDocument, read_unit
from megahybrid.data_prep.inputs import cut_units
from megahybrid.data_prep.items import Fields
from tests.data_prep.reading import files_of


def read_all(path: Path, unit_bytes: int = 2**20) -> list[Document | LongDocument | BadDocument]:
    return [item for unit in cut_units(files_of(path), unit_bytes) for item in read_unit(unit)]


def texts(items: list[Document | LongDocument | BadDocument]) -> list[str]:
    return [item.text for item in items if isinstance(item, Document)]


def problems(items: list[Document | LongDocument | BadDocument]) -> list[tuple[int, str]]:
    return [(item.offset, item.reason) for item in items if isinstance(item, BadDocument)]


def zstd(raw: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    return zstandard.ZstdCompressor(write_checksum=True).compress(raw)


PACKERS = {"gz": gzip.compress, "zst": zstd}


def member(number: int, lines: int = 2000) -> tuple[list[str], bytes]:
    draw = random.Random(number)
    found = [f"{number} {i} {draw.random()}" for i in range(lines)]
    return found, "".join(json.dumps({"text": text}) + "\n" for text in found).encode()


@pytest.fixture(params=PACKERS, ids=str)
def packed(request: pytest.FixtureRequest) -> tuple[str, Callable[[bytes], bytes]]:
    return request.param, PACKERS[request.param]


def test_members_are_read_as_one_text(tmp_path: Path, packed) -> None:
    suffix, pack = packed
    members = [member(number) for number in range(3)]
    path = tmp_path / f"a.jsonl.{suffix}"
    # The last line of one member may go on in the next.
    whole = b"".join(raw for _, raw in members)
    path.write_bytes(pack(whole[:50_001]) + pack(whole[50_001:]))
    items = read_all(path)
    assert texts(items) == [text for lines, _ in members for text in lines]
    for item in items:
        assert isinstance(item, Document)
        offset = int(item.name.rpartition(":")[2])
        assert json.loads(whole[offset:].split(b"\n")[0])["text"] == item.text


def test_broken_member_is_left_out_whole_and_the_others_are_read(tmp_path: Path, packed) -> None:
    suffix, pack = packed
    members = [member(number) for number in range(4)]
    raws = [bytearray(pack(raw)) for _, raw in members]
    raws[1][len(raws[1]) // 2] ^= 16
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(b"".join(raws))
    items = read_all(path)
    assert texts(items) == members[0][0] + members[2][0] + members[3][0]
    reason = {"gz": "broken gzip member", "zst": "broken zstd frame"}[suffix]
    assert problems(items) == [(len(members[0][1]), reason)]


def test_truncated_file_gives_the_lines_that_are_whole(tmp_path: Path, packed) -> None:
    suffix, pack = packed
    members = [member(number, 20_000) for number in range(2)]
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes((pack(members[0][1]) + pack(members[1][1]))[:-5000])
    items = read_all(path)
    expected = members[0][0] + members[1][0]
    found = texts(items)
    assert found == expected[: len(found)] and len(found) > len(members[0][0])
    (problem,) = problems(items)
    assert problem[1] == {"gz": "truncated gzip", "zst": "truncated zstd"}[suffix]


def test_text_file_with_a_broken_member_is_no_document(tmp_path: Path, packed) -> None:
    suffix, pack = packed
    path = tmp_path / f"a.txt.{suffix}"
    path.write_bytes(pack(b"one text\n" * 3) + pack(b"and its end"))
    assert texts(read_all(path)) == ["one text\n" * 3 + "and its end"]
    path.write_bytes(path.read_bytes()[:-3])
    assert texts(read_all(path)) == [] and len(problems(read_all(path))) == 1


def test_long_packed_text_is_streamed(tmp_path: Path, packed, monkeypatch) -> None:
    suffix, pack = packed
    monkeypatch.setattr(plain_text, "LONG_BYTES", 1000)
    path = tmp_path / f"a.txt.{suffix}"
    text = "".join(f"line {n} é\n" for n in range(5000))
    path.write_bytes(pack(text.encode()))
    (unit,) = cut_units(files_of(path))
    (found,) = ["".join(item.pieces) for item in read_unit(unit) if isinstance(item, LongDocument)]
    assert found == text


def test_decompression_bomb_is_not_unpacked(tmp_path: Path, packed, monkeypatch) -> None:
    suffix, pack = packed
    monkeypatch.setattr(compressed, "BOMB_BYTES", 2**20)
    path = tmp_path / f"a.jsonl.{suffix}"
    lines, raw = member(0)
    path.write_bytes(pack(raw) + pack(bytes(2**27)))
    items = read_all(path)
    assert texts(items) == lines
    assert problems(items) == [(len(raw), "decompression bomb")]


@pytest.mark.parametrize("raw", [b"", b"no archive", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"])
def test_file_that_is_not_packed_is_named(tmp_path: Path, packed, raw: bytes) -> None:
    path = tmp_path / f"a.jsonl.{packed[0]}"
    path.write_bytes(raw)
    items = read_all(path)
    assert texts(items) == [] and len(items) == (1 if raw else 0)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 255), st.sampled_from(sorted(PACKERS)))
def test_any_flipped_byte_costs_at_most_its_member(
    tmp_path_factory: pytest.TempPathFactory, place: int, flip: int, suffix: str
) -> None:
    members = [member(number, 30) for number in range(3)]
    raw = bytearray(b"".join(PACKERS[suffix](raw) for _, raw in members))
    raw[place % len(raw)] ^= flip
    path = tmp_path_factory.mktemp("flip") / f"a.jsonl.{suffix}"
    path.write_bytes(raw)
    found = texts(read_all(path))
    assert set(found) <= {text for lines, _ in members for text in lines}
    assert len(found) >= 60


def test_stretches_give_the_bytes_they_promise(tmp_path: Path, packed) -> None:
    path = tmp_path / f"a.{packed[0]}"
    path.write_bytes(packed[1](b"abc" * 1000))
    kind = packing_by_name(path)
    assert kind is not None
    (stretch,) = scan(path, kind)
    assert stretch.packed == path.stat().st_size and stretch.lost == 0
    with open_stretch(path, kind, stretch) as file:
        assert file.read() == b"abc" * 1000


@pytest.mark.parametrize("unit_bytes", [1, 10**9])
def test_rows_of_a_table_are_documents(tmp_path: Path, unit_bytes: int) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    rows = ["one", None, "two\n", "", "a\0b", "é" * 3000]
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"id": range(6), "text": rows}), path, row_group_size=2)
    items = read_all(path, unit_bytes)
    assert texts(items) == ["one", "two\n", "é" * 3000]
    assert problems(items) == [(1, "no text field 'text'"), (3, "empty"), (4, "NUL character")]
    raw = path.read_bytes()
    path.write_bytes(raw[:-10])
    assert problems(read_all(path)) == [(0, "broken parquet")]
    path.write_bytes(raw[:4] + bytes(200) + raw[204:])
    damaged = read_all(path)
    assert any(reason == "broken parquet" for _, reason in problems(damaged))


def test_table_without_the_field_is_named(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    parquet.write_table(arrow.table({"body": ["one"]}), tmp_path / "a.parquet")
    assert problems(read_all(tmp_path / "a.parquet")) == [(0, "no text field 'text'")]


def test_columns_of_other_types_cost_no_text(tmp_path: Path) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path, raw = tmp_path / "a.parquet", ["é".encode(), b"\xff", None, b"four"]
    moments = arrow.array([1, 2, 3, 4], arrow.timestamp("ns"))  # datetime has no nanoseconds
    parquet.write_table(arrow.table({"text": raw, "at": moments}), path)
    (unit,) = cut_units(files_of(path))
    items = list(read_unit(unit, Fields("text", ("at",))))
    assert problems(items) == [(1, "broken utf-8"), (2, "no text field 'text'")]
    assert texts(items) == ["é", "four"]


def test_flipped_bit_in_a_table_is_noticed_where_pages_have_checksums(tmp_path: Path) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    table = arrow.table({"text": ["some words"]})
    parquet.write_table(table, path, compression="none", write_page_checksum=True)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"some words", b"same words", 1))
    assert problems(read_all(path)) == [(0, "broken parquet")]
