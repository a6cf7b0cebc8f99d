"""Verification: every byte of a dataset is read and compared with its manifest and indexes."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megahybrid.data.dataset import TokenDataset
from megahybrid.data.integrity import check_block
from megahybrid.data.manifest import ShardEntry
from megahybrid.data.shard_files import ShardFiles
from megahybrid.data.token_file import Array, ShardIndex
from megahybrid.errors import DataError

THREADS = 2


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
    if dataset.plan is not None:
        dataset.plan.check_contents(dataset.tokens)
    for mask in dataset.masks:
        mask.verify()
    for metadata in dataset.shard_metadata:
        if metadata is not None:
            metadata.verify()
    files = ShardFiles(dataset.shards)
    # Two blocks at a time: checksums and comparisons run outside of Python's lock.
    with ThreadPoolExecutor(THREADS) as pool:
        for number, shard in enumerate(dataset.shards):
            shard.check_contents()
            entry = entries[number] if entries else None
            block_bytes = entry.block_bytes if entry else 2**24
            ends = _document_ends(shard)
            waiting: deque[Future[int]] = deque()

            def check(block: int, job: _Job) -> int:
                begin = block * job.block_bytes
                data = files.read(job.number, begin, job.block_bytes)
                if job.entry is not None:
                    check_block(job.shard.bin_path, block, begin, data, job.entry.crc32[block])
                _check_tokens(dataset, job.shard, begin // job.shard.dtype.itemsize, data, job.ends)
                return len(data)

            job = _Job(number, shard, entry, block_bytes, ends)
            blocks = -(-shard.tokens * shard.dtype.itemsize // block_bytes)
            for block in range(blocks):
                waiting.append(pool.submit(check, block, job))
                if len(waiting) > THREADS:
                    progress(waiting.popleft().result())
            while waiting:
                progress(waiting.popleft().result())
    return dataset


class _Job(NamedTuple):
    """The facts that checking a block of one shard needs."""

    number: int
    shard: ShardIndex
    entry: ShardEntry | None
    block_bytes: int
    ends: np.ndarray


def _document_ends(shard: ShardIndex) -> np.ndarray:
    begins, lengths = shard.document_spans()
    return np.asarray(begins + lengths)[lengths > 0]


def _check_tokens(
    dataset: TokenDataset, shard: ShardIndex, first: int, data: Array, ends: np.ndarray
) -> None:
    tokens = np.frombuffer(data, shard.dtype)
    unsigned = tokens.view(f"<u{shard.dtype.itemsize}")  # a negative id is a huge one
    if int(unsigned.max()) >= dataset.vocab_size:
        index = int(np.argmax(unsigned >= dataset.vocab_size))
        raise DataError(
            f"{shard.bin_path} has token id {tokens[index]} at token {first + index}, not below "
            f"vocab_size={dataset.vocab_size}. Name the tokenizer that made the data."
        )
    if dataset.eod_id is None:
        return
    found = np.flatnonzero(tokens == dataset.eod_id) + first + 1
    low, high = np.searchsorted(ends, [first + 1, first + len(tokens) + 1])
    expected = ends[low:high]
    if not np.array_equal(found, expected):
        index = int(np.setxor1d(found, expected)[0]) - 1
        raise DataError(
            f"{shard.bin_path} and {shard.idx_path.name} disagree on a document's end at token "
            f"{index} (eod_id={dataset.eod_id}). Prepare the data again."
        )
