"""Hugging Face datasets as inputs, by the library's own loaders for local files."""

import json
from pathlib import Path

import pytest

from megahybrid.data.tokenizer import Tokenizer
from megahybrid.data.verify import verify_dataset
from megahybrid.data_prep.documents import BadDocument, Document, read_unit
from megahybrid.data_prep.inputs import cut_units
from megahybrid.data_prep.tokenize import tokenize
from megahybrid.errors import DataError
from tests.data_prep.reading import files_of

pytest.importorskip("datasets", reason="datasets is not installed")


def test_rows_of_a_streamed_dataset_are_documents(
    model: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    texts = [f"text {number}" for number in range(40)]
    for part in range(2):
        lines = [json.dumps({"text": text}) for text in texts[part::2]]
        (tmp_path / f"{part}.jsonl").write_text("\n".join([*lines, '{"text": null}']) + "\n")
    given = f"hf:json?data_files={tmp_path}/*.jsonl"
    files = files_of(given)
    items = [item for unit in cut_units(files) for item in read_unit(unit)]
    assert sorted(i.text for i in items if isinstance(i, Document)) == sorted(texts)
    assert [i.reason for i in items if isinstance(i, BadDocument)] == ["no text field 'text'"] * 2
    report = tokenize([given], model, tmp_path / "out", max_bad_fraction=0.5, quiet=True)
    dataset = verify_dataset(tmp_path / "out/train")
    assert report.documents == {"train": 40}
    found = {tokenizer.decode(dataset.document(i)[:-1].tolist()) for i in range(40)}
    assert found == set(texts)


def test_dataset_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="input hf:json.* cannot be read") as caught:
        list(cut_units(files_of(f"hf:json?data_files={tmp_path}/absent.jsonl")))
    assert "\n" not in str(caught.value)
