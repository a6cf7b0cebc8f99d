"""Our files against megatron-core's own reader and writer."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megahybrid.data.dataset import TokenDataset
from megahybrid.data.verify import verify_dataset
from megahybrid.errors import DataError
from tests.data.corpus import EOD, random_documents, write_corpus

indexed_dataset = pytest.importorskip(
    "megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed"
)


@pytest.mark.parametrize("vocab_size", [1000, 100_000])
def test_megatron_reads_what_we_write(tmp_path: Path, vocab_size: int) -> None:
    lengths = [40, 30, 200, 10, 1, 50]
    ours = write_corpus(tmp_path, lengths, vocab_size=vocab_size, shard_tokens=64)
    found: list[list[int]] = []
    for shard in ours.shards:
        theirs = indexed_dataset.IndexedDataset(str(shard.bin_path.with_suffix("")))
        assert theirs.index.dtype == shard.dtype.type
        cuts = theirs.document_indices
        for first, stop in pairwise(cuts):
            found.append(np.concatenate([theirs[i] for i in range(first, stop)]).tolist())
    documents = random_documents(lengths, vocab_size)
    assert found == [[*document.tolist(), EOD] for document in documents]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_files_are_megatrons_byte_for_byte(tmp_path: Path, dtype: type) -> None:
    vocab_size = 1000 if dtype is np.uint16 else 100_000
    write_corpus(tmp_path / "ours", [5, 17, 1, 9], vocab_size=vocab_size)
    documents = random_documents([5, 17, 1, 9], vocab_size)
    theirs = write_megatron(tmp_path, [[[*d.tolist(), EOD]] for d in documents], dtype)
    for end in ("bin", "idx"):
        expected = theirs.with_suffix(f".{end}").read_bytes()
        assert (tmp_path / f"ours/shard-00000.{end}").read_bytes() == expected


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_we_read_what_megatron_writes(tmp_path: Path, dtype: type) -> None:
    documents = [[[5, 6], [7]], [[8, 9, 10]], [[11], [12, 13], [14]]]
    path = write_megatron(tmp_path, documents, dtype)
    for given in (path, path.with_suffix(".bin"), path.with_suffix(".idx"), tmp_path):
        dataset = TokenDataset(given, vocab_size=100)
        assert dataset.read(0, dataset.tokens).tolist() == list(range(5, 15))
        assert list(dataset.document_spans()) == [(0, 3), (3, 3), (6, 4)]
        for start in range(10):
            for length in range(1, 11 - start):
                ends = dataset.document_ends(start, dataset.read(start, length))
                assert ends.tolist() == [e - start for e in (2, 5, 9) if 0 <= e - start < length]
    verify_dataset(path, vocab_size=100)
    with pytest.raises(DataError, match="token id 14 at token 9, not below vocab_size=14"):
        TokenDataset(path, vocab_size=14).read(0, 10)
    with pytest.raises(DataError, match="has no manifest.json, so its vocabulary is unknown"):
        TokenDataset(path)


def test_boundaries_of_several_foreign_files_are_found(tmp_path: Path) -> None:
    write_megatron(tmp_path, [[[5, 6]], [[7]]], np.uint16, "a")
    write_megatron(tmp_path, [[[8, 9, 10]]], np.uint16, "b")
    dataset = TokenDataset(tmp_path, vocab_size=100)
    assert dataset.document_ends(0, dataset.read(0, 6)).tolist() == [1, 2, 5]
    assert dataset.document_ends(1, dataset.read(1, 3)).tolist() == [0, 1]


def test_foreign_floats_are_no_token_ids(tmp_path: Path) -> None:
    path = write_megatron(tmp_path, [[[5, 6]]], np.float32)
    with pytest.raises(DataError, match="has dtype code 7, not one of token ids"):
        TokenDataset(path, vocab_size=100)


def write_megatron(
    folder: Path, documents: list[list[list[int]]], dtype: type, name: str = "theirs"
) -> Path:
    """Documents as lists of sequences."""
    path = folder / name
    builder = indexed_dataset.IndexedDatasetBuilder(f"{path}.bin", dtype=dtype)
    for sequences in documents:
        for sequence in sequences:
            builder.add_item(indexed_dataset.torch.tensor(sequence))
        builder.end_document()
    builder.finalize(f"{path}.idx")
    return path
