import json
from pathlib import Path

import pytest

from megahybrid.data_prep import plain_text
from megahybrid.data_prep.documents import BadDocument, Document, read_unit
from megahybrid.data_prep.inputs import cut_units
from megahybrid.errors import DataError
from tests.data_prep.reading import files_of


def read_all(path: Path, unit_bytes: int = 2**20) -> list[Document | BadDocument]:
    return [item for unit in cut_units(files_of(path), unit_bytes) for item in read_unit(unit)]


@pytest.mark.parametrize("unit_bytes", [1, 7, 40, 10_000])
def test_lines_are_the_same_however_the_file_is_cut(tmp_path: Path, unit_bytes: int) -> None:
    path = tmp_path / "a.jsonl"
    texts = [f"text {i} " + "é\n" * (i % 13) for i in range(50)]
    lines = [json.dumps({"text": t}, ensure_ascii=False) for t in texts]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    found = read_all(path, unit_bytes)
    assert [item.text for item in found if isinstance(item, Document)] == texts
    raw = path.read_bytes()
    for item in found:
        offset = int(item.name.rpartition(":")[2])
        assert json.loads(raw[offset:].split(b"\n")[0])["text"] == item.text


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"text": "a"', "broken json"),
        (b"[" * 100_000, "broken json"),
        (b'{"text": "a\xff"}', "broken utf-8"),
        (b'{"text": "a\\u0000b"}', "NUL character"),
        (b'{"text": "a\\ud800b"}', "lone surrogate"),
        (b'{"text": " \\n"}', "empty"),
        (b'{"body": "a"}', "no text field 'text'"),
        (b'{"text": 5}', "no text field 'text'"),
        (b'"a"', "no text field 'text'"),
        (b'{"text": NaN}', "no text field 'text'"),
    ],
)
def test_bad_line_is_named_with_its_place_and_the_rest_is_read(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "two"}')
    first, bad, last = read_all(path)
    assert isinstance(first, Document) and isinstance(last, Document)
    assert bad == BadDocument(str(path), 16, reason, line[:80], len(line) + 1)


def test_line_beyond_the_limit_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_text, "MAX_LINE_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * 500 + b'"}\n{"text": "two"}\n')
    bad, good = read_all(path)
    assert isinstance(bad, BadDocument) and bad.reason == "line too long"
    assert isinstance(good, Document) and good.text == "two"


def test_text_file_is_one_document_without_its_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffline\r\nline".encode())
    assert read_all(path) == [Document(f"{path}:0", "line\r\nline", size=13)]


def test_folder_is_searched_in_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.py", "a/c.py", "a/.git/d.py", "a/__pycache__/e.py", "x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    names = [str(f.path.relative_to(tmp_path)) for f in files_of(tmp_path)]
    assert names == ["a/c.py", "b.py", "x.txt"]
    assert len(files_of(tmp_path, tmp_path / "b.py", pattern="**/*.py")) == 2
    assert len(files_of(f"{tmp_path}/*.py")) == 1


@pytest.mark.parametrize("name, message", [("absent", "names no file"), ("a.xz", "is .xz, which")])
def test_input_that_cannot_be_read_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "a.xz").write_bytes(b"")
    with pytest.raises(DataError, match=message):
        files_of(tmp_path / name)
