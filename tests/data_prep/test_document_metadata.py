"""Fields kept beside the tokens follow their documents through everything."""

import datetime
import decimal
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megahybrid.data.dataset import TokenDataset
from megahybrid.data.tokenizer import Tokenizer
from megahybrid.data.verify import verify_dataset
from megahybrid.data_prep.inputs import Fields
from megahybrid.data_prep.kept_fields import metadata_line
from megahybrid.data_prep.merge import Split
from megahybrid.data_prep.rewrite import merge_datasets, shuffle_datasets
from megahybrid.data_prep.tokenize import tokenize
from megahybrid.errors import DataError
from tests.data_prep.test_commands import call


@pytest.fixture
def with_metadata(tmp_path: Path, model: Path) -> Path:
    """A corpus with ids, urls here and there, and a document with neither."""
    draw = random.Random(1)
    lines = []
    for number in range(200):
        row = {"id": number, "text": f"n {number} " + "a b " * draw.randint(1, 300)}
        lines.append(json.dumps(row | ({"url": f"é/{number}"} if number % 3 else {})))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "in/text.txt").write_text("no row")
    tokenize(
        [tmp_path / "in"],
        model,
        tmp_path / "out",
        kept=["id", "url"],
        held_out=0.2,
        shard_tokens=9000,
        quiet=True,
    )
    return tmp_path / "out"


def check(dataset: TokenDataset, tokenizer: Tokenizer) -> set[int]:
    """Every document has its own note; returns their ids."""
    ids = set()
    for index in range(dataset.documents):
        text = tokenizer.decode(dataset.document(index).tolist())
        metadata = dataset.metadata(index)
        if text == "no row":
            assert metadata == {}
            continue
        number = int(text.split()[1])
        assert metadata == {"id": number} | ({"url": f"é/{number}"} if number % 3 else {})
        ids.add(number)
    return ids


def test_notes_follow_their_documents(
    with_metadata: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    parts = [verify_dataset(with_metadata / part) for part in ("train", "held_out")]
    assert len(parts[0].shards) > 2
    assert sorted(n for part in parts for n in check(part, tokenizer)) == list(range(200))
    paths = [with_metadata / "train", with_metadata / "held_out"]
    merge_datasets(paths, tmp_path / "merged", shard_tokens=5000)
    assert check(verify_dataset(tmp_path / "merged"), tokenizer) == set(range(200))
    shuffle_datasets(paths, tmp_path / "again", split=Split(0.1, 3), memory_bytes=30_000)
    found = [check(verify_dataset(path), tokenizer) for path in (tmp_path / "again").iterdir()]
    assert set().union(*found) == set(range(200))
    dataset = parts[0]
    for index in (0, 7, dataset.documents - 1):
        start = list(dataset.document_spans())[index]
        assert dataset.document_at(start[0]) == dataset.document_at(sum(start) - 1) == index


def test_how_often_each_field_was_found_is_told(
    with_metadata: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, output = with_metadata.parent / "in", f"{with_metadata.parent}/told"
    for _ in range(2):  # a finished job says the same again
        call(
            *("tokenize", str(rows), "--tokenizer", str(model), "--output", output),
            *("--keep", "url", "--keep", "id", "--keep", "uri"),
        )
        told = "kept beside the tokens: url of 133 rows, id of 200 rows, uri of 0 rows\n"
        assert told in capsys.readouterr().out


def test_notes_are_shown_and_checked(
    with_metadata: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("inspect", f"{with_metadata}/train", "--documents", "4")
    assert "id " in capsys.readouterr().out
    path = with_metadata / "train/shard-00000.jsonl"
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"1", b"2", 1))
    with pytest.raises(DataError, match=r"shard-00000.jsonl has crc32 \d+, not \d+"):
        verify_dataset(with_metadata / "train")
    path.write_bytes(raw[:-1])
    with pytest.raises(DataError, match=r"shard-00000.jsonl and .* are not of this shard"):
        TokenDataset(with_metadata / "train")


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


PLAIN = [
    (math.nan, None),
    (-math.inf, None),
    ([1.5, math.nan, {"a": math.inf}], [1.5, None, {"a": None}]),
    (b"caf\xc3\xa9", "café"),
    (b"\xff\x00\x10", "ff0010"),
    ([b"a", bytearray(b"b")], ["a", "b"]),
    ("a\ud800b\n", "a\ufffdb\n"),
    ({"k\udfff": {b"raw": 1}, 3: True}, {"k\ufffd": {"raw": 1}, "3": True}),
    (datetime.date(2024, 2, 29), "2024-02-29"),
    (decimal.Decimal("1.10"), "1.10"),
    (np.asarray([1.0, np.nan]), [1.0, None]),
    (np.float32("inf"), None),
    (10**30, 10**30),
]


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@pytest.mark.parametrize("value, expected", PLAIN, ids=[repr(value)[:20] for value, _ in PLAIN])
def test_notes_are_json_that_any_reader_takes(value: object, expected: object) -> None:
    line = Fields("text", ("x",)).metadata({"x": value, "text": "t"})
    assert b"\n" not in line
    assert json.loads(line.decode("ascii"), parse_constant=refuse) == {"x": expected}


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text() | st.binary() | st.integers(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.binary(), inner),
    )
)
def test_any_value_becomes_a_strict_line(value: object) -> None:
    line = metadata_line({"x": value})
    json.loads(line.decode("ascii"), parse_constant=refuse)["x"]
    # An escaped pair is one character; half of one alone could not be written as UTF-8.
    json.dumps(json.loads(line), ensure_ascii=False).encode("utf-8")
    assert b"\n" not in line


def test_what_is_nested_too_deep_is_cut_off() -> None:
    assert json.loads(metadata_line({"x": deep(20)})) == {"x": deep(20)}
    json.loads(metadata_line({"x": deep(50_000)}))


def test_rows_with_numbers_that_are_none_keep_strict_notes(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"text": "one", "score": NaN}\n{"text": "two", "score": 2}\n'
    )
    tokenize([tmp_path / "a.jsonl"], model, tmp_path / "out", kept=["score"], quiet=True)
    lines = (tmp_path / "out/train/shard-00000.jsonl").read_text().splitlines()
    scores = [json.loads(line, parse_constant=refuse)["score"] for line in lines]
    assert sorted(scores, key=str) == [2, None]
