import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megahybrid.data.order import Permutation, SourceOrder, checksum
from megahybrid.errors import DataError
from tests.data.corpus import PlainOrder


@given(st.integers(1, 3000), st.integers(0, 2**63), st.text(), st.integers(0, 10**6))
def test_permutation_is_a_bijection_at_every_size_and_key(
    size: int, seed: int, name: str, epoch: int
) -> None:
    permutation = Permutation(size, seed, name, epoch)
    assert sorted(permutation.array(np.arange(size)).tolist()) == list(range(size))


@given(st.integers(1, 2**44), st.integers(0, 100), st.data())
def test_permutation_of_many_values_is_that_of_each(
    size: int, seed: int, data: st.DataObject
) -> None:
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True))
    permutation = Permutation(size, seed, "a", 0)
    found = permutation.array(np.asarray(indices))
    assert found.tolist() == [permutation(index) for index in indices]
    assert len(set(found.tolist())) == len(indices) and max(found.tolist()) < size


def test_permutation_looks_random_in_every_place() -> None:
    # Of 1600 keys, each value should land on each of 8 places about 200 times (sigma 13).
    counts = np.zeros((8, 8))
    for key in range(1600):
        counts[np.arange(8), Permutation(8, key).array(np.arange(8)).astype(int)] += 1
    assert np.abs(counts - 200).max() < 55


def test_permutation_moves_neighbours_apart() -> None:
    permutation = Permutation(10_000, 1, "a", 0)
    values = np.asarray([permutation(index) for index in range(10_000)])
    assert np.mean(np.abs(np.diff(values)) < 100) < 0.03
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.05


def test_order_of_a_key_never_changes() -> None:
    # A change here would give every resumed run other data.
    permutation = Permutation(10, 1, "web", 0)
    assert [permutation(index) for index in range(10)] == [1, 0, 8, 5, 7, 9, 6, 4, 3, 2]
    assert checksum([[0, 5], [1, 0]]) == 1560623670


orders = st.tuples(
    st.integers(1, 200), st.integers(0, 5), st.integers(1, 40), st.integers(1, 9)
).map(lambda t: (t[0], dict(seed=t[1], name="a", block_tokens=t[2], lanes=t[3])))


@settings(max_examples=40)
@given(orders, st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9)), max_size=8))
def test_rows_are_those_of_the_order_written_out(
    order: tuple[int, dict[str, object]], takes: list[tuple[int, int]]
) -> None:
    tokens, options = order
    fast, plain = SourceOrder(tokens, **options), PlainOrder(tokens, **options)
    cursor = fast.start()
    for length, rows in takes:
        taken, cursor = fast.take(cursor, length, rows)
        for spans in taken:
            expected = plain.row(length)
            assert [start + i for start, size in spans for i in range(size)] == [
                token for token, _ in expected
            ]
            joins = np.cumsum([size for _, size in spans])[:-1].tolist()
            assert joins == [place for place, (_, begins) in enumerate(expected) if begins]
        assert cursor == plain.at == fast.check(cursor)


@given(orders, st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9)), max_size=8))
def test_each_token_is_an_input_once_per_epoch(
    order: tuple[int, dict[str, object]], takes: list[tuple[int, int]]
) -> None:
    tokens, options = order
    fast = SourceOrder(tokens, **options)
    cursor = fast.start()
    counts = np.zeros(tokens, int)
    for length, rows in takes:
        taken, cursor = fast.take(cursor, length, rows)
        for spans in taken:
            for start, size in spans:
                assert start // fast.block_tokens == (start + size - 1) // fast.block_tokens
                counts[start : start + size] += 1
    expected = np.zeros(tokens, int)
    for lane, (n, offset) in enumerate(cursor):
        for block in range(lane, n, fast.lanes):
            start, size = fast.block_span(block)
            expected[start : start + size] += 1
        start, _ = fast.block_span(n)
        expected[start : start + offset] += 1
    assert counts.tolist() == expected.tolist()
    begun = max(n if offset else n - fast.lanes for n, offset in cursor)
    assert counts.min() >= min(n for n, _ in cursor) // fast.blocks
    assert counts.max() <= begun // fast.blocks + 1


def test_whole_blocks_of_dividing_lengths_have_no_joins() -> None:
    order = SourceOrder(64 * 10, seed=0, name="a", block_tokens=64, lanes=4)
    cursor = order.start()
    for length in (32, 16, 8, 8):
        rows, cursor = order.take(cursor, length, 100)
        assert all(len(spans) == 1 for spans in rows)


def test_longer_rows_after_shorter_ones_join_at_most_once_a_block() -> None:
    order = SourceOrder(64 * 10, seed=0, name="a", block_tokens=64, lanes=4)
    _, cursor = order.take(order.start(), 8, 7)
    rows, _ = order.take(cursor, 16, 400)
    assert 0 < sum(len(spans) - 1 for spans in rows) <= 400 * 16 / 64


def test_small_source_uses_fewer_lanes() -> None:
    assert SourceOrder(1000, seed=0, name="a", block_tokens=64, lanes=64).lanes == 15
    assert SourceOrder(10, seed=0, name="a", block_tokens=64, lanes=64).lanes == 1


@pytest.mark.parametrize(
    "cursor",
    [
        None,
        [],
        [[0, 0]],
        [[0, 0], [2, 0]],
        [[0, 0], [1, 64]],
        [[0, 0], [1, -1]],
        [[0, 0], [1.0, 0]],
    ],
)
def test_cursor_that_cannot_be_is_refused(cursor: object) -> None:
    order = SourceOrder(640, seed=0, name="web", block_tokens=64, lanes=2)
    with pytest.raises(DataError, match="data.sources.web does not fit its order"):
        order.check(cursor)


def test_empty_source_is_refused() -> None:
    with pytest.raises(DataError, match="data.sources.web holds no tokens"):
        SourceOrder(0, seed=0, name="web", block_tokens=64, lanes=2)
