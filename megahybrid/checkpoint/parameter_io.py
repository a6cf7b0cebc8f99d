"""A parameter of any layout, filled from a checkpoint's fragments.

`start` and `stop` count elements of the flattened local parameter, as ZeRO cuts it; padding of the
vocabulary is never written and comes back as zero.
"""

import numpy as np

from megahybrid.checkpoint.fragments import Array
from megahybrid.checkpoint.reader import Reader
from megahybrid.parallel.sharding import ShardSpec


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
