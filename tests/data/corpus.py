"""Small datasets for tests, and the order of a source written out the slow way."""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from megahybrid.data.batches import Batch
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.held_out import numbered_batches
from megahybrid.data.manifest import TokenizerInfo
from megahybrid.data.order import Permutation
from megahybrid.data.token_writer import TokenWriter

EOD = 1


def tokenizer_info(vocab_size: int = 1000) -> TokenizerInfo:
    return TokenizerInfo(kind="sentencepiece", sha256="ab" * 32, vocab_size=vocab_size, eod_id=EOD)


def random_documents(
    lengths: Sequence[int], vocab_size: int = 1000, seed: int = 0
) -> list[np.ndarray]:
    """Documents without eod, of lengths - 1 tokens, so that on disk they have `lengths`."""
    draw = np.random.default_rng(seed)
    return [draw.integers(2, vocab_size, length - 1) for length in lengths]


def write_corpus(
    folder: Path,
    lengths: Sequence[int],
    *,
    vocab_size: int = 1000,
    shard_tokens: int = 2**20,
    block_bytes: int = 64,
    seed: int = 0,
) -> TokenDataset:
    with TokenWriter(
        folder, tokenizer_info(vocab_size), shard_tokens=shard_tokens, block_bytes=block_bytes
    ) as writer:
        for document in random_documents(lengths, vocab_size, seed):
            writer.add(document)
    return TokenDataset(folder)


def all_tokens(dataset: TokenDataset) -> np.ndarray:
    return np.concatenate(
        [np.fromfile(shard.bin_path, shard.dtype).astype(np.int64) for shard in dataset.shards]
    )


class PlainOrder:
    """The contract read aloud, one token at a time: lanes, blocks, the least advanced lane."""

    def __init__(self, tokens: int, seed: int, name: str, block_tokens: int, lanes: int) -> None:
        blocks = [
            list(range(first, min(first + block_tokens, tokens)))
            for first in range(0, tokens, block_tokens)
        ]
        self.blocks, self.block_tokens = blocks, block_tokens
        self.permutation = cache(lambda epoch: Permutation(len(blocks), seed, name, epoch))
        self.lanes = max(1, min(lanes, tokens // block_tokens))
        self.at = [[lane, 0] for lane in range(self.lanes)]

    def row(self, length: int) -> list[tuple[int, bool]]:
        """Source tokens of the next row, and for each whether a block begins there in the row."""
        lane = min(
            range(self.lanes),
            key=lambda lane: self.at[lane][0] // self.lanes * self.block_tokens + self.at[lane][1],
        )
        found: list[tuple[int, bool]] = []
        for place in range(length):
            n, offset = self.at[lane]
            epoch, index = divmod(n, len(self.blocks))
            block = self.blocks[self.permutation(epoch)(index)]
            found.append((block[offset], offset == 0 and place > 0))
            self.at[lane] = [n, offset + 1]
            if offset + 1 == len(block):
                self.at[lane] = [n + self.lanes, 0]
        return found


def evaluation_batches(
    dataset: TokenDataset, length: int, micro_rows: int, **options: Any
) -> Iterator[Batch]:
    """The batches of a held-out set, without the numbers of their documents."""
    return (batch for _, batch in numbered_batches(dataset, length, micro_rows, **options))
