"""A long line gives the same document as parsing it whole, and the same complaint."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megahybrid.data_prep import long_line, plain_text
from megahybrid.data_prep.documents import BadDocument, BadText, Document, LongDocument, read_unit
from megahybrid.data_prep.inputs import cut_units
from tests.data_prep.reading import files_of

strings = st.text(st.sampled_from('ab"\\/\n\té\u4e2d\U0001f600\x1f u'), min_size=1, max_size=400)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is long, here."""
    monkeypatch.setattr(plain_text, "LONG_BYTES", 100)
    monkeypatch.setattr(long_line, "LONG_STRING", 20)
    monkeypatch.setattr(long_line, "PIECE_BYTES", 23)


def read(path: Path) -> list[tuple[str, str]]:
    """Text, or the reason why there is none."""
    found = []
    for unit in cut_units(files_of(path)):
        for item in read_unit(unit):
            if isinstance(item, BadDocument):
                found.append(("bad", item.reason))
            elif isinstance(item, Document):
                found.append(("text", item.text))
            else:
                assert isinstance(item, LongDocument)
                try:
                    found.append(("text", "".join(item.pieces)))
                except BadText as error:
                    found.append(("bad", str(error)))
    return found


@settings(max_examples=300, deadline=None)
@given(text=strings, other=strings, ascii_only=st.booleans(), last=st.booleans())
def test_long_lines_give_their_text(
    tmp_path_factory: pytest.TempPathFactory, text: str, other: str, ascii_only: bool, last: bool
) -> None:
    value = {"a": other, "text": text} if last else {"text": text, "a": {"b": [other, 1]}}
    path = tmp_path_factory.mktemp("long") / "a.jsonl"
    path.write_text(json.dumps(value, ensure_ascii=ascii_only) + "\n", encoding="utf-8")
    expected = ("text", text) if text.strip() else ("bad", "empty")
    assert read(path) == [expected]


LONG = b"x" * 150


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"text": "' + LONG, "broken json"),
        (b'{"text": "' + LONG + b'"', "broken json"),
        (b'{"text": "' + LONG + b'\\"}', "broken json"),
        (b'{"text": "' + LONG + b'\\q"}', "broken json"),
        (b'{"text": "' + LONG + b'\xff"}', "broken utf-8"),
        (b'{"text": "' + LONG + b'\\u0000"}', "NUL character"),
        (b'{"text": "' + b" " * 150 + b'"}', "empty"),
        (b'{"test": "' + LONG + b'"}', "no text field 'text'"),
        (b'{"text": ["' + LONG + b'"]}', "no text field 'text'"),
        (b"[" * 150, "broken json"),
        (b'\xff{"a": ' + LONG, "broken utf-8"),
    ],
)
def test_long_line_that_is_no_document_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(line + b'\n{"text": "good"}\n')
    assert read(path) == [("bad", reason), ("text", "good")]
