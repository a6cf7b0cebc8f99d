"""Keyed draws: every value is a function of (seed, name, place), so any slice is drawn alone.

There is no state to save and no rank draws a whole tensor: a tile of at most 64 rows × 1,024
columns has a Philox stream of its own (Salmon et al., SC 2011), and every degree cuts the same
tiles.
"""

import json
from hashlib import blake2b

import numpy as np
import torch
from torch import nn

from megahybrid.parallel.sharding import ShardSpec

BLOCK_ROWS = 64
BLOCK_COLUMNS = 1024


def key(seed: int, *names: str | int) -> int:
    """A stable 63-bit number of the seed and names, fit to seed numpy, torch or Philox."""
    text = json.dumps([seed, *names]).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 1


def normal_rows(
    seed: int,
    name: str,
    rows: tuple[int, int],
    row_length: int,
    std: float,
    block_rows: int = BLOCK_ROWS,
    columns: tuple[int, int] | None = None,
) -> np.ndarray:
    """float32 [stop - start, columns] of the tensor `name` with rows of `row_length`, N(0, std²).

    Always drawn in float32, so that a float64 model starts from the same values. Only the tiles
    that the slice touches are drawn.
    """
    (row_start, row_stop), (column_start, column_stop) = rows, columns or (0, row_length)
    values = np.empty((row_stop - row_start, column_stop - column_start), dtype=np.float32)
    for block in range(row_start // block_rows, -(-row_stop // block_rows)):
        top = block * block_rows
        first, last = max(top, row_start), min(top + block_rows, row_stop)
        for column_block in range(column_start // BLOCK_COLUMNS, -(-column_stop // BLOCK_COLUMNS)):
            left = column_block * BLOCK_COLUMNS
            width = min(BLOCK_COLUMNS, row_length - left)
            begin, end = max(left, column_start), min(left + width, column_stop)
            stream = np.random.Philox(key=key(seed, name, block, column_block))
            # Row-major, so the rows above the slice are drawn and thrown away, those below are not.
            tile = np.random.Generator(stream).standard_normal(
                (last - top, width), dtype=np.float32
            )
            values[
                first - row_start : last - row_start, begin - column_start : end - column_start
            ] = tile[first - top :, begin - left : end - left]
    values *= np.float32(std)
    return values


@torch.no_grad()
def fill_normal(
    parameter: nn.Parameter, spec: ShardSpec, seed: int, std_by_segment: dict[str, float]
) -> None:
    """Fills this rank's shard, a block of rows at a time; vocabulary padding becomes zero.

    Canonical tensors of more than two dimensions are drawn as rows of everything after the first.
    """
    parameter.zero_()
    flat = parameter.view(-1)
    for segment, offset, _ in spec.flat_ranges():
        (start, stop), *rest = spec.box(segment)
        row_length = int(np.prod(segment.shape[1:], dtype=np.int64))
        if len(rest) > 1 and segment.dim not in (0, None):
            raise ValueError(f"{segment.name}: only matrices can be cut by dimension {segment.dim}")
        columns = rest[0] if len(rest) == 1 else (0, row_length)
        width = columns[1] - columns[0]
        std = std_by_segment[segment.name]
        blocks = range(start - start % BLOCK_ROWS, stop, BLOCK_ROWS)
        for first, last in ((max(b, start), min(b + BLOCK_ROWS, stop)) for b in blocks):
            drawn = normal_rows(seed, segment.name, (first, last), row_length, std, columns=columns)
            position = offset + (first - start) * width
            flat[position : position + drawn.size].copy_(torch.from_numpy(drawn).view(-1))
