"""The way between parameters and fragments by ShardSpec: what an engine needs of a checkpoint.

`start` and `stop` count elements of the flattened local parameter, as ZeRO cuts it; padding of the
vocabulary is never written and comes back as zero.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from megahybrid.checkpoint.fragments import Array, Fragment
from megahybrid.checkpoint.reader import Reader
from megahybrid.parallel.sharding import ShardSpec


def cut(spec: ShardSpec, state: str, start: int, stop: int, data: Any) -> Iterator[Fragment]:
    """The fragments of elements start…stop of a parameter; `data` holds just those, flat float32.

    Replicated segments are given by tensor rank 0 alone.
    """
    if len(data) != stop - start:
        raise ValueError(f"{len(data)} values for elements {start} to {stop}")
    for segment, low, high in spec.flat_ranges():
        first, last = max(start, low), min(stop, high)
        if first >= last or (segment.dim is None and spec.rank > 0):
            continue
        flat = (first - low, last - low)
        part = data[first - start : last - start]
        yield Fragment(segment.name, state, spec.box(segment), flat, part)


def fill(reader: Reader, spec: ShardSpec, state: str, start: int, stop: int) -> Array:
    """Elements start…stop of a parameter, [stop - start] float32, out of any layout's fragments."""
    out = np.zeros(stop - start, dtype=np.float32)
    for segment, low, high in spec.flat_ranges():
        first, last = max(start, low), min(stop, high)
        if first < last:
            out[first - start : last - start] = reader.read_flat(
                segment.name, state, spec.box(segment), (first - low, last - low)
            )
    return out
