"""Laws of ShardSpec: split then join is identity, boxes tile, flat ranges are where boxes lie."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megahybrid.parallel.sharding import (
    Segment,
    ShardSpec,
    attach_shard_spec,
    box_shape,
    box_slices,
    shard_spec,
)

Layout = tuple[list[tuple[str, tuple[int, ...], int | None]], int, int | None]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """(segments, degree, padded) of one parameter: fused, cut along 1, replicated or padded."""
    degree = draw(st.sampled_from([1, 2, 3, 4, 8]))
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    kind = draw(st.sampled_from(["fused", "columns", "replicated", "vector", "vocabulary"]))
    if kind == "fused":
        sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
        return (
            [(f"s{i}", (size * degree, columns), 0) for i, size in enumerate(sizes)],
            degree,
            None,
        )
    if kind == "columns":
        return [("s", (rows, columns * degree), 1)], degree, None
    if kind == "replicated":
        return [("s", (rows, columns), None)], degree, None
    if kind == "vector":
        return [("s", (columns * degree,), draw(st.sampled_from([0, None])))], degree, None
    vocab_size = draw(st.integers(1, 40))
    multiple = degree * draw(st.sampled_from([1, 8, 32]))
    return [("s", (vocab_size, columns), 0)], degree, -(-vocab_size // multiple) * multiple


def all_ranks(layout: Layout) -> list[ShardSpec]:
    """The specs of all tensor ranks."""
    segments, degree, padded = layout
    parts = tuple(Segment(*segment) for segment in segments)
    return [ShardSpec(parts, degree, rank, padded) for rank in range(degree)]


def canonical(spec: ShardSpec) -> dict[str, torch.Tensor]:
    """Tensors whose every element is different."""
    return {
        segment.name: torch.arange(1, 1 + torch.Size(segment.shape).numel()).view(segment.shape)
        + 10_000 * index
        for index, segment in enumerate(spec.segments)
    }


@given(layouts())
def test_split_then_join_is_identity(layout: Layout) -> None:
    specs = all_ranks(layout)
    full = canonical(specs[0])
    joined = ShardSpec.join([(spec, spec.split(full)) for spec in reversed(specs)])
    assert joined.keys() == full.keys()
    assert all(torch.equal(joined[name], full[name]) for name in full)


@given(layouts())
def test_flat_ranges_hold_the_boxes_and_the_rest_is_zero(layout: Layout) -> None:
    for spec in all_ranks(layout):
        full = canonical(spec)
        flat = spec.split(full).reshape(-1).clone()
        for segment, start, stop in spec.flat_ranges():
            box = spec.box(segment)
            expected = full[segment.name][box_slices(box)]
            assert torch.equal(flat[start:stop].view(box_shape(box)), expected)
            flat[start:stop] = 0
        assert not flat.any()


@given(layouts())
def test_boxes_of_a_cut_tensor_cover_each_element_once(layout: Layout) -> None:
    specs = all_ranks(layout)
    for segment in specs[0].segments:
        covered = torch.zeros(segment.shape, dtype=torch.int64)
        for spec in specs:
            covered[box_slices(spec.box(segment))] += 1
        expected = 1 if segment.dim is not None else len(specs)
        assert (covered == expected).all()


@given(layouts())
def test_mark_is_true_exactly_where_ranks_hold_shards(layout: Layout) -> None:
    for spec in all_ranks(layout):
        parameter = attach_shard_spec(nn.Parameter(torch.zeros(spec.parameter_shape)), spec)
        assert shard_spec(parameter) is spec
        cut = any(segment.dim is not None for segment in spec.segments)
        assert parameter.tensor_model_parallel is cut


def test_rank_beyond_a_short_vocabulary_holds_an_empty_box() -> None:
    segment = Segment("embedding.weight", (5, 3), 0)
    last = ShardSpec((segment,), degree=4, rank=3, padded=32)
    assert last.box(segment) == ((5, 5), (0, 3))
    assert last.local_shape(segment) == (8, 3)
    assert last.flat_ranges() == [(segment, 0, 0)]


def test_incomplete_or_foreign_shards_do_not_join() -> None:
    specs = [ShardSpec((Segment("s", (4, 2), 0),), 2, rank) for rank in range(2)]
    other = ShardSpec((Segment("t", (4, 2), 0),), 2, 1)
    local = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"tensor ranks \[1\] are not the 2 ranks"):
        ShardSpec.join([(specs[1], local)])
    with pytest.raises(ValueError, match="not of one parameter"):
        ShardSpec.join([(specs[0], local), (other, local)])


def test_parameter_that_nobody_described_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 2\) has no ShardSpec"):
        shard_spec(nn.Parameter(torch.zeros(3, 2)))
    with pytest.raises(ValueError, match=r"s: shape \(3, 2\) is not \(4, 2\)"):
        attach_shard_spec(
            nn.Parameter(torch.zeros(3, 2)), ShardSpec((Segment("s", (4, 2), None),), 1, 0)
        )
    with pytest.raises(ValueError, match=r"s: \(3, 2\) is not \(4, 2\)"):
        ShardSpec((Segment("s", (4, 2), None),), 1, 0).split({"s": torch.zeros(3, 2)})
