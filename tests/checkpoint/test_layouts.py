"""What any layout wrote, any other reads, to the bit."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megahybrid.checkpoint.fragments import STATES, Fragment
from megahybrid.checkpoint.parameter_io import fill
from megahybrid.checkpoint.reader import Reader, verify
from megahybrid.errors import CheckpointError
from megahybrid.parallel.sharding import Segment, ShardSpec
from tests.checkpoint.examples import (
    SHAPES,
    plain_fragments,
    save_together,
    snapshot,
    values,
)

VOCABULARY = 13


def cut(spec: ShardSpec, state: str, start: int, stop: int, data: np.ndarray) -> Iterator[Fragment]:
    """Yield the fragments of elements start…stop of a parameter; `data` holds just those, flat.

    Replicated segments are given by tensor rank 0 alone.
    """
    assert len(data) == stop - start
    for segment, low, high in spec.flat_ranges():
        first, last = max(start, low), min(stop, high)
        if first >= last or (segment.dim is None and spec.rank > 0):
            continue
        flat = (first - low, last - low)
        part = data[first - start : last - start]
        yield Fragment(segment.name, state, spec.box(segment), flat, part)


def specs(degree: int, rank: int) -> list[ShardSpec]:
    """A fused projection, an output projection, a padded vocabulary, a norm, scalars per head."""
    fused = tuple(
        Segment(name, (rows, 4), 0) for name, rows in (("query", 8), ("key", 4), ("value", 4))
    )
    padded = -(-VOCABULARY // (2 * degree)) * 2 * degree
    return [
        ShardSpec((Segment("embedding", (VOCABULARY, 4), 0),), degree, rank, padded),
        ShardSpec(fused, degree, rank),
        ShardSpec((Segment("output", (4, 8), 1),), degree, rank),
        ShardSpec((Segment("norm", (4,), None),), degree, rank),
        ShardSpec((Segment("scale", (4,), 0),), degree, rank),
        ShardSpec((Segment("kernel", (4, 3, 2), 1 if degree in (1, 3) else 0),), degree, rank),
    ]


def partitions(spec_list: list[ShardSpec], data: int, each: bool) -> Iterator[list[tuple]]:
    """Per data rank (parameter, start, stop): ZeRO-3 cuts each parameter, ZeRO-1 them joined."""
    sizes = [int(np.prod(spec.parameter_shape)) for spec in spec_list]
    for rank in range(data):
        if each:
            yield [
                (index, *(min(size, -(-size // data) * edge) for edge in (rank, rank + 1)))
                for index, size in enumerate(sizes)
            ]
            continue
        share = -(-sum(sizes) // data)
        low, high = rank * share, (rank + 1) * share
        ends = np.cumsum([0, *sizes]).tolist()
        yield [
            (index, max(low, first) - first, min(high, last) - first)
            for index, (first, last) in enumerate(pairwise(ends))
            if max(low, first) < min(high, last)
        ]


def full_tensors() -> dict[str, tuple[int, ...]]:
    return {segment.name: segment.shape for spec in specs(1, 0) for segment in spec.segments}


def local(spec: ShardSpec, state: str) -> np.ndarray:
    """The independent answer: split by ShardSpec out of the full tensors."""
    full = {name: torch.from_numpy(values(name, state, s)) for name, s in full_tensors().items()}
    return spec.split(full).reshape(-1).numpy()


degrees = st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 5), st.booleans())


@settings(max_examples=12, deadline=None)
@given(written=degrees, read=degrees)
def test_any_layout_reads_what_any_layout_wrote(
    written: tuple[int, int, bool], read: tuple[int, int, bool]
) -> None:
    tensor, data, each = written
    snapshots = []
    for rank in range(tensor):
        own = specs(tensor, rank)
        for shares in partitions(own, data, each):
            fragments = [
                fragment
                for state in STATES
                for index, start, stop in shares
                for fragment in cut(
                    own[index], state, start, stop, local(own[index], state)[start:stop]
                )
            ]
            snapshots.append(replace(snapshot(1, fragments), tensors=full_tensors()))
    with tempfile.TemporaryDirectory() as run:
        (result, *_) = save_together(Path(run), snapshots)
        assert result.path is not None, result.error
        verify(result.path)
        tensor, data, each = read
        with Reader(result.path) as reader:
            reader.coverage()
            for rank in range(tensor):
                own = specs(tensor, rank)
                for shares in partitions(own, data, each):
                    for index, start, stop in shares:
                        for state in STATES:
                            found = fill(reader, own[index], state, start, stop)
                            expected = local(own[index], state)[start:stop]
                            assert found.tobytes() == expected.tobytes()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_box_of_a_tensor_is_read_from_any_cut(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as run:
        cuts = data.draw(st.integers(1, 9))
        (result,) = save_together(Path(run), [snapshot(1, plain_fragments(1, cuts))])
        assert result.path is not None
        with Reader(result.path) as reader:
            for name, shape in SHAPES.items():
                ranges = [sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in shape]
                box = tuple((start, stop) for start, stop in ranges)
                expected = values(name, "exp_avg", shape)[tuple(slice(*side) for side in box)]
                assert np.array_equal(reader.read(name, "exp_avg", box), expected)


def test_bits_that_are_no_numbers_survive(tmp_path: Path) -> None:
    odd = np.array([np.nan, -0.0, np.inf, 1e-45], dtype=np.float32)
    odd[0:1].view(np.uint32)[:] = 0x7FC12345
    parts = [Fragment("x", "weight", ((0, 4),), (0, 4), torch.from_numpy(odd))]
    given_snapshot = replace(snapshot(1, parts), tensors={"x": (4,)}, states=("weight",))
    (result,) = save_together(tmp_path, [given_snapshot])
    assert result.path is not None
    assert Reader(result.path).read("x", "weight", ((0, 4),)).tobytes() == odd.tobytes()


def test_a_rank_without_a_share_writes_no_file(tmp_path: Path) -> None:
    results = save_together(tmp_path, [snapshot(1, []), snapshot(1), snapshot(1, [])])
    assert len({result.path for result in results}) == 1 and results[0].path is not None
    names = sorted(path.name for path in results[0].path.iterdir())
    assert names == ["fragments-0001.safetensors", "manifest.json"]


def test_other_tensors_states_and_shapes_are_refused_with_both_values(tmp_path: Path) -> None:
    parts = [part for part in plain_fragments(1) if part.state == "weight"]
    (result,) = save_together(tmp_path, [replace(snapshot(1, parts), states=("weight",))])
    assert result.path is not None
    reader = Reader(result.path)
    with pytest.raises(CheckpointError, match="holds no tensor 'blocks.0'"):
        reader.read("blocks.0", "weight", ((0, 1),))
    with pytest.raises(CheckpointError, match=r"no exp_avg of head.weight \(it holds weight\)"):
        reader.read("head.weight", "exp_avg", ((0, 1), (0, 1)))
    with pytest.raises(CheckpointError, match=r"shape \[7, 4\].*wanted \[\[0, 8\], \[0, 4\]\]"):
        reader.read("head.weight", "weight", ((0, 8), (0, 4)))


@pytest.mark.parametrize("fault", ["missing", "twice", "both"])
def test_a_state_that_is_not_held_exactly_once_is_never_published(
    tmp_path: Path, fault: str
) -> None:
    parts = plain_fragments(1, cuts=4)
    if fault in ("missing", "both"):
        del parts[1]
    if fault in ("twice", "both"):
        parts.append(parts[2])
    with pytest.raises(CheckpointError, match=r"step 1 cannot be saved: embedding.weight \(weight"):
        save_together(tmp_path, [snapshot(1, parts), snapshot(1, [])])
    assert list((tmp_path / "checkpoints").iterdir()) == []
