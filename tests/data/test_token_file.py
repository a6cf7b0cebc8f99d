import json
import os
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megahybrid.data.dataset import TokenDataset
from megahybrid.data.manifest import MANIFEST_NAME
from megahybrid.data.packing import PLAN_NAME, PlanInfo
from megahybrid.data.token_file import HEADER, MAGIC
from megahybrid.data.token_writer import TokenWriter
from megahybrid.data.verify import verify_dataset
from megahybrid.errors import DataError
from tests.data.corpus import EOD, all_tokens, random_documents, tokenizer_info, write_corpus

LENGTHS = [5, 1, 30, 7, 64, 2, 9, 200, 3]


@pytest.mark.parametrize("vocab_size, dtype", [(65_536, "uint16"), (65_537, "int32")])
def test_what_is_written_is_read(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    dataset = write_corpus(tmp_path, LENGTHS, vocab_size=vocab_size, shard_tokens=64)
    assert dataset.manifest is not None and dataset.manifest.dtype == dtype
    assert (dataset.tokens, dataset.documents) == (sum(LENGTHS), len(LENGTHS))
    for index, document in enumerate(random_documents(LENGTHS, vocab_size)):
        assert dataset.document(index).tolist() == [*document.tolist(), EOD]
    assert [size for _, size in dataset.document_spans()] == LENGTHS
    assert dataset.read(0, dataset.tokens).tolist() == all_tokens(dataset).tolist()
    verify_dataset(tmp_path)


def test_manifest_says_what_the_folder_holds(tmp_path: Path) -> None:
    write_corpus(tmp_path, LENGTHS, shard_tokens=64)
    value = json.loads((tmp_path / MANIFEST_NAME).read_text())
    assert list(value) == [
        *("format", "version", "tokenizer", "dtype", "documents", "tokens"),
        *("length_histogram", "shards", "sources", "command"),
    ]
    assert list(value["tokenizer"]) == ["kind", "sha256", "vocab_size", "eod_id"]
    assert list(value["shards"][0]) == [
        *("bin", "idx", "documents", "tokens", "bytes", "block_bytes", "crc32"),
    ]
    histogram = {item["min_tokens"]: item["documents"] for item in value["length_histogram"]}
    assert histogram == {1: 1, 2: 2, 4: 2, 8: 1, 16: 1, 64: 1, 128: 1}
    assert sum(item["tokens"] for item in value["length_histogram"]) == sum(LENGTHS)


def test_shards_are_bounded_and_a_longer_document_is_several_sequences(tmp_path: Path) -> None:
    dataset = write_corpus(tmp_path, [40, 30, 200, 10], shard_tokens=64)
    assert [shard.tokens for shard in dataset.shards] == [40, 30, 200, 10]
    assert dataset.shards[2].lengths().tolist() == [64, 64, 64, 8]
    assert dataset.shards[2].documents == 1


def test_dataset_without_documents_can_be_read(tmp_path: Path) -> None:
    assert write_corpus(tmp_path, []).tokens == 0
    verify_dataset(tmp_path)


def test_interrupted_writing_leaves_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), TokenWriter(tmp_path, tokenizer_info()) as writer:
        writer.add([5, 6])
        raise KeyboardInterrupt
    assert not (tmp_path / MANIFEST_NAME).exists()
    with pytest.raises(DataError, match="is not a dataset"):
        TokenDataset(tmp_path)


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([5, 1000], "token id 1000 is outside vocab_size=1000"),
        ([5, -3], "token id -3 is outside vocab_size=1000"),
        ([5, EOD, 7], "eod_id=1 must be at the end of every document and nowhere else"),
    ],
)
def test_documents_that_cannot_be_written_are_refused(
    tmp_path: Path, tokens: list[int], message: str
) -> None:
    with pytest.raises(DataError, match=message), TokenWriter(tmp_path, tokenizer_info()) as writer:
        writer.add(tokens)


def test_folder_in_use_is_not_written_to(tmp_path: Path) -> None:
    write_corpus(tmp_path, LENGTHS)
    with pytest.raises(DataError, match="is not empty"):
        TokenWriter(tmp_path, tokenizer_info())


def cut_one_byte(folder: Path) -> None:
    path = folder / "shard-00000.bin"
    os.truncate(path, path.stat().st_size - 1)


def cut_index(folder: Path) -> None:
    path = folder / "shard-00000.idx"
    os.truncate(path, path.stat().st_size - 8)


def cut_header(folder: Path) -> None:
    os.truncate(folder / "shard-00000.idx", 20)


def remove_shard(folder: Path) -> None:
    (folder / "shard-00001.bin").unlink()


def add_shard(folder: Path) -> None:
    (folder / "shard-00009.bin").write_bytes(b"")


def break_manifest(folder: Path) -> None:
    (folder / MANIFEST_NAME).write_text('{"format": ')


def swap_shards(folder: Path) -> None:
    for end in ("bin", "idx"):
        first, second = folder / f"shard-00000.{end}", folder / f"shard-00001.{end}"
        first.rename(folder / "kept")
        second.rename(first)
        (folder / "kept").rename(second)


def add_mask(folder: Path) -> None:
    (folder / "shard-00000.mask").write_bytes(b"\0")


def edit(field: str, value: object) -> object:
    def change(folder: Path) -> None:
        path = folder / MANIFEST_NAME
        content = json.loads(path.read_text())
        content[field] = value
        path.write_text(json.dumps(content))

    return change


@pytest.mark.parametrize(
    "damage, message",
    [
        (cut_one_byte, r"shard-00000.bin has 107 bytes, not 108 \(the last offset"),
        (cut_index, r"shard-00000.idx has \d+ bytes, not \d+ \(header: 4 sequences"),
        (cut_header, "shard-00000.idx has 20 bytes, fewer than its header's 34"),
        (remove_shard, r"shard-00001.bin cannot be read \(No such file"),
        (add_shard, r"holds shard-00009.bin, which its manifest.json does not list"),
        (break_manifest, "manifest.json is not JSON"),
        (swap_shards, r"shard-00000.idx: tokens=\d+ is not what manifest.json says \(54\)"),
        (add_mask, "shard-00000.mask marks targets that do not count"),
        (edit("tokens", 5), r"tokens=5 is not 321 \(sum over shards\)"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damaged_dataset_is_refused_in_one_line(tmp_path: Path, damage, message: str) -> None:
    write_corpus(tmp_path, [20, 30, 3, 1, 62, 2, 3, 200], shard_tokens=64)
    damage(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        TokenDataset(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a dataset: no manifest.json and no .idx"):
        TokenDataset(tmp_path / "absent")


def test_folder_above_a_dataset_is_told_where_it_is(tmp_path: Path) -> None:
    write_corpus(tmp_path / "train", LENGTHS)
    with pytest.raises(DataError, match="Did you mean .*train?"):
        TokenDataset(tmp_path)


def test_token_beyond_the_vocabulary_is_found_when_it_is_read(tmp_path: Path) -> None:
    dataset = write_corpus(tmp_path, [20, 30])
    raw = np.memmap(tmp_path / "shard-00000.bin", np.uint16, mode="r+")
    raw[33] = 60_000
    raw.flush()
    dataset.read(0, 33)
    with pytest.raises(DataError, match="token id 60000 at token 33, not below vocab_size=1000"):
        dataset.read(20, 20)


def test_negative_token_is_found_when_it_is_read(tmp_path: Path) -> None:
    dataset = write_corpus(tmp_path, [20, 30], vocab_size=100_000)
    raw = np.memmap(tmp_path / "shard-00000.bin", np.int32, mode="r+")
    raw[33] = -1
    raw.flush()
    with pytest.raises(DataError, match="token id -1 at token 33"):
        dataset.read(20, 20)


def test_data_of_another_model_or_tokenizer_is_refused(tmp_path: Path) -> None:
    dataset = write_corpus(tmp_path, LENGTHS)
    with pytest.raises(DataError, match="model.vocab_size=999 is smaller than .* \\(1000\\)"):
        TokenDataset(tmp_path, vocab_size=999)
    dataset.check_tokenizer("ab" * 32)
    with pytest.raises(
        DataError, match="data.tokenizer has sha256 cccccccccccc, but .* abababababab"
    ):
        dataset.check_tokenizer("c" * 64)


@given(st.integers(0, 33), st.integers(1, 255))
def test_flipped_header_byte_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, byte: int, flip: int
) -> None:
    check_flip(tmp_path_factory.mktemp("flip"), "shard-00000.idx", byte, flip)


@given(st.data(), st.sampled_from(["shard-00000.idx", MANIFEST_NAME]), st.integers(1, 255))
def test_flipped_byte_of_index_or_manifest_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str, flip: int
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    check_flip(folder, name, data.draw(st.integers(0, 800)), flip)


def check_flip(folder: Path, name: str, byte: int, flip: int) -> None:
    expected = all_tokens(write_corpus(folder, [20, 30, 3]))
    raw = bytearray((folder / name).read_bytes())
    raw[byte % len(raw)] ^= flip
    (folder / name).write_bytes(raw)
    try:
        dataset = TokenDataset(folder)
        found = dataset.read(0, dataset.tokens)
        spans = list(dataset.document_spans())
    except DataError as error:
        assert "\n" not in str(error)
        return
    # What is not covered by sizes (the tokenizer's name, say) must not change the tokens.
    assert found.tolist() == expected.tolist()
    assert sum(size for _, size in spans) == len(expected)


@settings(max_examples=150)
@given(
    st.binary(max_size=200),
    st.sampled_from([0, 1, 4, 8, 9]),
    st.integers(0, 8),
    st.integers(0, 8),
    st.integers(0, 60),
)
def test_any_index_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    body: bytes,
    code: int,
    sequences: int,
    entries: int,
    bin_bytes: int,
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    expected = 12 * sequences + 8 * entries
    body = (body * (expected // max(1, len(body)) + 1))[:expected] if body else bytes(expected)
    (folder / "a.idx").write_bytes(HEADER.pack(MAGIC, 1, code, sequences, entries) + body)
    (folder / "a.bin").write_bytes(bytes(bin_bytes))
    try:
        dataset = TokenDataset(folder, vocab_size=10)
        spans = list(dataset.document_spans())
    except DataError as error:
        assert "\n" not in str(error)
        return
    assert sum(size for _, size in spans) == dataset.tokens
    assert dataset.read(0, dataset.tokens).tolist() == [0] * dataset.tokens if spans else True


@given(st.recursive(st.none() | st.integers() | st.text(), st.lists), st.data())
def test_any_plan_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: object, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("plan")
    known = [field.name for field in fields(PlanInfo)]
    value = {"format": "megahybrid-plan", "version": 1} | dict.fromkeys(known, 1)
    value[data.draw(st.sampled_from(list(value)))] = content
    (folder / PLAN_NAME).write_text(json.dumps(value))
    with pytest.raises(DataError) as caught:
        TokenDataset(folder)
    assert "\n" not in str(caught.value)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(0, 15))
def test_verify_finds_every_flipped_bit(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("bit")
    dataset = write_corpus(folder, LENGTHS)
    raw = np.memmap(folder / "shard-00000.bin", np.uint16, mode="r+")
    raw[place % dataset.tokens] ^= 1 << bit
    raw.flush()
    with pytest.raises(DataError, match=r"shard-00000.bin block \d+ .* has crc32"):
        verify_dataset(folder)


def test_verify_finds_documents_that_do_not_end_with_eod(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [20, 30], seed=1)
    write_corpus(tmp_path / "b", [22, 28], seed=1)
    (tmp_path / "b/shard-00000.idx").replace(tmp_path / "a/shard-00000.idx")
    with pytest.raises(DataError, match="disagree on a document's end at token 19"):
        verify_dataset(tmp_path / "a")
