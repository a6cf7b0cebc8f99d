"""Keyed draws: a slice drawn alone is the slice of the whole, at every degree."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megahybrid.parallel.random import BLOCK_COLUMNS, fill_normal, key, normal_rows
from megahybrid.parallel.sharding import Segment, ShardSpec

ROWS, COLUMNS = 150, 2300  # several blocks each way, the last ones short
WHOLE = normal_rows(3, "w", (0, ROWS), COLUMNS, 0.5)


def ranges(size: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, size - 1), st.integers(1, size)).map(
        lambda pair: (min(pair), max(pair[0] + 1, pair[1]))
    )


@given(ranges(ROWS), ranges(COLUMNS))
def test_any_slice_drawn_alone_is_the_slice_of_the_whole(
    rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    alone = normal_rows(3, "w", rows, COLUMNS, 0.5, columns=columns)
    assert np.array_equal(alone, WHOLE[slice(*rows), slice(*columns)])


def test_draws_are_normal_with_the_standard_deviation_asked_for() -> None:
    assert abs(WHOLE.mean()) < 4 * 0.5 / WHOLE.size**0.5
    assert abs(WHOLE.std() - 0.5) < 4 * 0.5 / (2 * WHOLE.size) ** 0.5
    blocks = WHOLE[:128, : 2 * BLOCK_COLUMNS].reshape(2, 64, 2, BLOCK_COLUMNS)
    blocks = blocks.transpose(0, 2, 1, 3).reshape(4, -1)
    correlations = np.corrcoef(blocks)[np.triu_indices(4, 1)]
    assert np.abs(correlations).max() < 5 / blocks.shape[1] ** 0.5  # streams are unrelated


def test_key_is_stable_and_tells_seed_and_names_apart() -> None:
    assert key(1, "embedding.weight", 0) == 3645735142836996165
    keys = [key(1, "a", "b"), key(1, "ab"), key(1, "a", 0), key(1, "a", "0"), key(2, "a", "b")]
    assert len(set(keys)) == len(keys)
    assert all(0 <= k < 2**63 for k in keys)


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("kind", ["fused", "columns", "vocabulary", "vector"])
def test_every_degree_is_filled_with_the_same_values(degree: int, kind: str) -> None:
    segments, padded = {
        "fused": ((Segment("q", (136, 40), 0), Segment("k", (72, 40), 0)), None),
        "columns": ((Segment("o", (70, 2400), 1),), None),
        "vocabulary": ((Segment("e", (97, 40), 0),), 128),
        "vector": ((Segment("s", (72,), 0),), None),
    }[kind]
    std = {"q": 0.5, "k": 2.0, "o": 1.0, "e": 1.0, "s": 1.0}
    shards = []
    for rank in range(degree):
        spec = ShardSpec(segments, degree, rank, padded)
        parameter = nn.Parameter(torch.full(spec.parameter_shape, torch.nan))
        fill_normal(parameter, spec, 11, std)
        shards.append((spec, parameter.detach()))
        rows = spec.box(segments[0])[0]
        assert kind != "vocabulary" or not parameter[rows[1] - rows[0] :].any()
    for name, tensor in ShardSpec.join(shards).items():
        row_length = tensor[0].numel()
        expected = normal_rows(11, name, (0, tensor.shape[0]), row_length, std[name])
        assert np.array_equal(tensor.numpy().reshape(expected.shape), expected)


def test_filling_holds_no_more_than_a_few_blocks() -> None:
    spec = ShardSpec((Segment("w", (4096, 4096), 0),), 2, 1)
    parameter = nn.Parameter(torch.zeros(spec.parameter_shape, dtype=torch.bfloat16))
    tracemalloc.start()
    fill_normal(parameter, spec, 1, {"w": 1.0})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 64 * 4096 * 4  # bytes; the shard alone is 33 MB in fp32
