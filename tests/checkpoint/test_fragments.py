"""Laws of boxes, flat ranges and their rectangles."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megahybrid.checkpoint.fragments import (
    Box,
    Flat,
    Fragment,
    coverage_fault,
    intersect,
    rectangles,
    shape_of,
    slices,
    volume,
    whole,
)


@st.composite
def boxes(draw: st.DrawFn, dims: int | None = None) -> Box:
    dims = draw(st.integers(0, 3)) if dims is None else dims
    sides = [draw(st.tuples(st.integers(0, 3), st.integers(0, 4))) for _ in range(dims)]
    return tuple((start, start + size) for start, size in sides)


@st.composite
def boxes_with_ranges(draw: st.DrawFn, dims: int | None = None) -> tuple[Box, Flat]:
    box = draw(boxes(dims))
    size = math.prod(stop - start for start, stop in box)
    start = draw(st.integers(0, size))
    return box, (start, draw(st.integers(start, size)))


@given(boxes_with_ranges())
def test_rectangles_hold_the_flat_range_in_order_and_without_gap(case: tuple[Box, Flat]) -> None:
    box, flat = case
    tensor = np.arange(7 ** len(box)).reshape((7,) * len(box))
    expected = tensor[slices(box, whole(tensor.shape))].reshape(-1)[slice(*flat)]
    found = [
        (offset, tensor[slices(part, whole(tensor.shape))].reshape(-1))
        for part, offset in rectangles(box, flat)
    ]
    at = 0
    for offset, part in found:
        assert offset == at and len(part) > 0
        at += len(part)
    joined = np.concatenate([part for _, part in found]) if found else expected[:0]
    assert np.array_equal(joined, expected)


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_a_matrix_range_is_at_most_three_rectangles(
    rows: int, columns: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, rows * columns))
    stop = data.draw(st.integers(start, rows * columns))
    assert len(rectangles(whole((rows, columns)), (start, stop))) <= 3


@given(st.data())
def test_intersection_is_what_both_boxes_hold(data: st.DataObject) -> None:
    left = data.draw(boxes())
    right = tuple(data.draw(st.sampled_from([(0, 2), (1, 5), (2, 2), (3, 7)])) for _ in left)
    marks = np.zeros((8,) * len(left), dtype=int)
    marks[slices(left, whole(marks.shape))] += 1
    marks[slices(right, whole(marks.shape))] += 1
    shared = intersect(left, right)
    assert (0 if shared is None else volume(shared)) == int((marks == 2).sum())
    if shared is not None:
        assert shape_of(shared) == marks[slices(shared, whole(marks.shape))].shape


@given(st.integers(0, 3), st.integers(0, 3), st.booleans(), st.data())
def test_coverage_agrees_with_counting_every_element(
    dims: int, cuts: int, spoil: bool, data: st.DataObject
) -> None:
    target = whole((3, 4, 2)[:dims])
    edges = sorted(data.draw(st.integers(0, volume(target))) for _ in range(cuts))
    parts = [(target, flat) for flat in pairwise([0, *edges, volume(target)])]
    if spoil:
        parts.append(data.draw(boxes_with_ranges(dims)))
        parts.pop(data.draw(st.integers(0, len(parts) - 1)))
    counts = np.zeros((7,) * dims, dtype=int)
    for box, flat in parts:
        for part, _ in rectangles(box, flat):
            counts[slices(part, whole(counts.shape))] += 1
    wanted = counts[slices(target, whole(counts.shape))]
    assert (coverage_fault(parts, target) is None) == bool((wanted == 1).all())


def test_a_gap_as_large_as_an_overlap_is_found() -> None:
    box = whole((4, 4))
    fault = coverage_fault([(box, (0, 8)), (box, (4, 8)), (box, (12, 16))], box)
    assert fault == "elements [[1, 2], [0, 4]] are held twice"


def test_a_gap_and_an_overlap_are_named() -> None:
    box = whole((6,))
    assert coverage_fault([(box, (0, 2)), (box, (3, 6))], box) == "1 of 6 elements are missing"
    assert coverage_fault([(box, (0, 4)), (box, (3, 6))], box) == "elements [[3, 4]] are held twice"


def test_a_scalar_is_covered_by_one_fragment_and_not_by_two() -> None:
    assert coverage_fault([((), (0, 1))], ()) is None
    assert coverage_fault([((), (0, 1)), ((), (0, 1))], ()) == "elements [[0, 1]] are held twice"


@pytest.mark.parametrize(
    ("box", "flat", "data"),
    [
        (((0, 2), (0, 2)), (0, 5), np.zeros(5, np.float32)),
        (((0, 2), (0, 2)), (0, 3), np.zeros(2, np.float32)),
        (((0, 2), (0, 2)), (3, 2), np.zeros(0, np.float32)),
    ],
    ids=["beyond_box", "too_few_values", "backwards"],
)
def test_a_fragment_that_contradicts_itself_is_refused(
    box: Box, flat: Flat, data: np.ndarray
) -> None:
    with pytest.raises(ValueError, match="weight"):
        Fragment("weight", "weight", box, flat, data)


def test_only_float32_is_written() -> None:
    from megahybrid.checkpoint.fragments import as_numpy

    with pytest.raises(TypeError, match="bfloat16"):
        as_numpy(torch.zeros(2, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="float64"):
        as_numpy(np.zeros(2))
    parameter = torch.nn.Parameter(torch.ones(3))
    assert as_numpy(parameter).tolist() == [1, 1, 1]
