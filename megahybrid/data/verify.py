"""Reads every byte of a dataset and compares it with what its manifest and indexes say."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megahybrid.data.dataset import TokenDataset
from megahybrid.data.guard import check_block
from megahybrid.data.token_file import ShardIndex
from megahybrid.errors import DataError


def verify_dataset(
    path: str | Path,
    *,
    vocab_size: int | None = None,
    progress: Callable[[int], None] = lambda done_bytes: None,
) -> TokenDataset:
    """Checks checksums, sizes, offsets, the range of ids and that eod ends every document.

    Raises DataError at the first thing that is wrong, naming file and block or token. A dataset
    without a manifest has no checksums and no eod; its indexes and ids are checked.
    """
    dataset = TokenDataset(path, vocab_size=vocab_size)
    entries = dataset.manifest.shards if dataset.manifest else ()
    for number, shard in enumerate(dataset.shards):
        shard.check_contents()
        entry = entries[number] if entries else None
        block_bytes = entry.block_bytes if entry else 2**24
        ends = _document_ends(shard)
        done = 0
        for block, data in enumerate(_blocks(shard.bin_path, block_bytes)):
            if entry is not None:
                begin = block * entry.block_bytes
                check_block(shard.bin_path, block, begin, data, entry.crc32[block])
            _check_tokens(dataset, shard, done // shard.dtype.itemsize, data, ends)
            done += len(data)
            progress(len(data))
    return dataset


def _blocks(path: Path, block_bytes: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while data := file.read(block_bytes):
            yield data


def _document_ends(shard: ShardIndex) -> np.ndarray:
    begins, lengths = shard.document_spans()
    return np.asarray(begins + lengths)[lengths > 0]


def _check_tokens(
    dataset: TokenDataset, shard: ShardIndex, first: int, data: bytes, ends: np.ndarray
) -> None:
    tokens = np.frombuffer(data, shard.dtype)
    wrong = (tokens.astype(np.int64) < 0) | (tokens >= dataset.vocab_size)
    if wrong.any():
        place = int(np.argmax(wrong))
        raise DataError(
            f"{shard.bin_path} has token id {tokens[place]} at token {first + place}, not below "
            f"vocab_size={dataset.vocab_size}. Name the tokenizer that made the data."
        )
    if dataset.eod_id is None:
        return
    found = np.flatnonzero(tokens == dataset.eod_id) + first + 1
    low, high = np.searchsorted(ends, [first + 1, first + len(tokens) + 1])
    expected = ends[low:high]
    if not np.array_equal(found, expected):
        place = int(np.setxor1d(found, expected)[0]) - 1
        raise DataError(
            f"{shard.bin_path} and {shard.idx_path.name} disagree on a document's end at token "
            f"{place} (eod_id={dataset.eod_id}). Prepare the data again."
        )
