"""Conversations for tests: documents of which a part of the tokens counts as targets."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megahybrid.data.dataset import TokenDataset
from megahybrid.data.manifest import TokenizerInfo
from megahybrid.data.token_writer import TokenWriter


def write_chats(
    folder: Path, lengths: Sequence[int], info: TokenizerInfo, *, seed: int = 0, every: int = 1
) -> TokenDataset:
    """Documents of `lengths` tokens, eod included; every so many-th has no mask of its own."""
    draw = np.random.default_rng(seed)
    with TokenWriter(folder, info, shard_tokens=500) as writer:
        for number, length in enumerate(lengths):
            size = length - 1
            tokens = (np.cumsum(draw.integers(0, 3, size)) + draw.integers(90)) % 90 + 2
            counts = draw.random(size) < 0.4 if every == 1 or number % every else None
            writer.add(tokens, counts)
    return TokenDataset(folder)
