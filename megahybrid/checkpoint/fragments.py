"""A fragment: some elements of a box of a canonical tensor; the geometry to cut and join them.

A `box` is a slice of the canonical tensor, one (start, stop) per dimension: what one rank of the
tensor axis holds. `flat` = (a, b) are the elements a…b of that box in row-major order: what ZeRO
leaves of it on one data rank. Any layout is a set of such pairs, so any layout can be read from any
other.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Box = tuple[tuple[int, int], ...]
Flat = tuple[int, int]
Array = NDArray[np.float32]

State = Literal["weight", "exp_avg", "exp_avg_sq"]
STATES: tuple[State, ...] = ("weight", "exp_avg", "exp_avg_sq")


def shape_of(box: Box) -> tuple[int, ...]:
    """Size of the box along each dimension."""
    return tuple(stop - start for start, stop in box)


def volume(box: Box) -> int:
    """Elements in the box; 1 for a scalar's box, which has no dimensions."""
    return math.prod(shape_of(box))


def whole(shape: Sequence[int]) -> Box:
    """The box that is the whole tensor."""
    return tuple((0, size) for size in shape)


def inside(box: Box, outer: Box) -> bool:
    """Return whether `box` is a well-formed box of as many dimensions within `outer`."""
    return len(box) == len(outer) and all(
        low <= start <= stop <= high for (start, stop), (low, high) in zip(box, outer, strict=True)
    )


def intersect(left: Box, right: Box) -> Box | None:
    """The box that two boxes share, or None where they share no element."""
    shared = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(left, right, strict=True))
    return shared if all(start < stop for start, stop in shared) else None


def rectangles(box: Box, flat: Flat) -> list[tuple[Box, int]]:
    """Cut the elements `flat` of `box` into rectangles in canonical coordinates.

    Each comes with its offset from flat[0]: its elements lie there in row-major order, and the
    rectangles follow one another without gap. A matrix yields at most three: the tail of a row,
    whole rows, the head of a row.
    """
    return list(_rectangles(box, flat[0], flat[1], 0))


def _rectangles(box: Box, start: int, stop: int, offset: int) -> Iterator[tuple[Box, int]]:
    if start >= stop:
        return
    if len(box) <= 1:
        yield tuple((low + start, low + stop) for low, _ in box), offset
        return
    (origin, _), rest = box[0], box[1:]
    row = volume(rest)
    while start < stop:
        index, within = divmod(start, row)
        if within or stop - start < row:
            end = min(stop, (index + 1) * row)
            for inner, at in _rectangles(rest, within, end - index * row, offset):
                yield ((origin + index, origin + index + 1), *inner), at
        else:
            rows = (stop - start) // row
            end = start + rows * row
            yield ((origin + index, origin + index + rows), *rest), offset
        offset += end - start
        start = end


def slices(part: Box, within: Box) -> tuple[slice, ...]:
    """The index that picks `part` out of an array holding the box `within`."""
    return tuple(
        slice(start - low, stop - low) for (start, stop), (low, _) in zip(part, within, strict=True)
    )


def as_numpy(data: Any) -> Array:
    """A flat fp32 numpy view of a numpy array or a torch tensor (copied only off an accelerator).

    Raises TypeError for any other dtype: a checkpoint never rounds.
    """
    if hasattr(data, "detach"):
        data = data.detach().cpu()
        if str(data.dtype) != "torch.float32":
            raise TypeError(f"fragment data is {data.dtype}; checkpoints hold float32 only")
        data = data.numpy()
    array = np.asarray(data)
    if array.dtype != np.float32 or array.ndim != 1:
        raise TypeError(f"fragment data is {array.dtype} {array.shape}; expected flat float32")
    return np.ascontiguousarray(array)


@dataclass(frozen=True, eq=False)
class Fragment:
    """Elements flat[0]…flat[1] of `box` of the canonical tensor `tensor`, for one state.

    `data` holds flat[1] - flat[0] float32 values, as a numpy array or a torch tensor.
    """

    tensor: str
    state: str
    box: Box
    flat: Flat
    data: Any

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise ValueError(f"{self.tensor}: state {self.state!r} is none of {STATES}")
        if not 0 <= self.flat[0] <= self.flat[1] <= volume(self.box):
            raise ValueError(f"{self.tensor}: flat {self.flat} leaves the box {self.box}")
        if len(self.data) != self.flat[1] - self.flat[0]:
            raise ValueError(f"{self.tensor}: {len(self.data)} values for flat {self.flat}")


def coverage_fault(parts: Iterable[tuple[Box, Flat]], target: Box) -> str | None:
    """Return why `parts` do not hold each element of `target` exactly once, or None.

    Elements are counted and overlaps looked for separately: a gap as large as an overlap elsewhere
    would leave the count right.
    """
    pieces = [
        shared
        for box, flat in parts
        for rectangle, _ in rectangles(box, flat)
        if (shared := intersect(rectangle, target)) is not None
    ]
    twice = _first_overlap(pieces)
    if twice is not None:
        return f"elements {[list(side) for side in twice]} are held twice"
    held = sum(volume(piece) for piece in pieces)
    if held != volume(target):
        return f"{volume(target) - held} of {volume(target)} elements are missing"
    return None


def _first_overlap(pieces: Sequence[Box]) -> Box | None:
    """Elements that two of the boxes share, or None."""
    flattened = [piece or ((0, 1),) for piece in pieces]
    corners = np.array(sorted(flattened), dtype=np.int64)
    for index in range(len(corners) - 1):
        # Sorted by their first row: nothing that starts after this one's last row can touch it.
        end = int(np.searchsorted(corners[:, 0, 0], corners[index, 0, 1], side="left"))
        others = corners[index + 1 : end]
        low = np.maximum(others[:, :, 0], corners[index, :, 0])
        high = np.minimum(others[:, :, 1], corners[index, :, 1])
        clash = (low < high).all(axis=1)
        if clash.any():
            at = int(clash.argmax())
            return tuple((int(a), int(b)) for a, b in zip(low[at], high[at], strict=True))
    return None
