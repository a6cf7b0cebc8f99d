"""Plans of whole documents: the packing itself, and what a run gets from it."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megahybrid.data.batches import make_batch
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.mixture import Mixture
from megahybrid.data_prep import pack as pack_module
from megahybrid.data_prep.pack import best_fit_decreasing, pack
from megahybrid.errors import DataError
from tests.data.corpus import write_corpus


def plain_best_fit(sizes: list[int], length: int) -> list[list[int]]:
    """One document after another, the longest first, each in the fullest row with room."""
    rows: list[list[int]] = []
    for size in sorted(sizes, reverse=True):
        room = [row for row in rows if sum(row) + size <= length]
        if room:
            max(room, key=sum).append(size)
        else:
            rows.append([size])
    return rows


@given(st.lists(st.integers(1, 60), max_size=150), st.integers(60, 90))
def test_packing_by_groups_is_best_fit_decreasing(sizes: list[int], length: int) -> None:
    groups = best_fit_decreasing(
        np.bincount(sizes or [0], minlength=length + 1)
        * (np.arange(max(length, max(sizes, default=0)) + 1) > 0),
        length,
    )
    found = sorted(
        sum(size * count for size, count in group.contents())
        for group in groups
        for _ in range(group.rows)
    )
    expected = plain_best_fit(sizes, length)
    assert found == sorted(map(sum, expected))
    held = [
        size
        for group in groups
        for size, count in group.contents()
        for _ in range(count * group.rows)
    ]
    assert sorted(held) == sorted(sizes)


documents = st.lists(st.integers(1, 90), min_size=1, max_size=40)


@settings(max_examples=60)
@given(documents, st.sampled_from(["best_fit", "stream"]), st.integers(1, 30), st.integers(5, 40))
def test_each_token_within_the_limits_is_in_one_row(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], method, low: int, length: int
) -> None:
    folder = tmp_path_factory.mktemp("pack")
    dataset = write_corpus(folder / "data", lengths, shard_tokens=100)
    wanted = {start: size for start, size in dataset.document_spans() if low <= size <= 70}
    options = dict(method=method, min_document_tokens=low, max_document_tokens=70)
    if not wanted:
        with pytest.raises(DataError, match="has no document of"):
            pack(folder / "data", folder / "plan", length, **options)
        return
    info = pack(folder / "data", folder / "plan", length, **options)
    packed = TokenDataset(folder / "plan")
    assert packed.plan is not None and packed.tokens == dataset.tokens
    counts = np.zeros(dataset.tokens, int)
    cut = 0
    for row in range(info.rows):
        spans = packed.plan.row(row, dataset.tokens)
        assert sum(size for _, size in spans) <= length
        for start, size in spans:
            counts[start : start + size] += 1
            cut += wanted.get(start) != size
    expected = np.zeros(dataset.tokens, int)
    for start, size in wanted.items():
        expected[start : start + size] = 1
    assert counts.tolist() == expected.tolist()
    assert (info.documents, info.tokens) == (len(wanted), expected.sum())
    if method == "stream":
        assert info.rows == -(-info.tokens // length)
    else:
        long = [size for size in wanted.values() if size > length]
        assert cut == sum(-(-size // length) for size in long)


def test_plan_is_a_source_with_the_same_promises(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    write_corpus(tmp_path / "data", draw.integers(2, 60, 200).tolist())
    info = pack(tmp_path / "data", tmp_path / "plan", 64)
    assert info.fill > 0.95

    def new() -> Mixture:
        sources = {"long": TokenDataset(tmp_path / "plan"), "web": TokenDataset(tmp_path / "data")}
        return Mixture(sources, {"long": 1, "web": 1}, seed=1, block_tokens=256, lanes=4)

    runs = new()
    state, seen = runs.start(), np.zeros(runs.datasets["long"].tokens, int)
    rows = 0
    while rows < info.rows:
        plans, state = runs.plan_step(state, 64, 2)
        runs = new()
        state = runs.restore(state)
        for plan in plans:
            if plan.source == "long":
                rows += 1
                for start, size in plan.spans:
                    seen[start : start + size] += 1
        batch = make_batch(runs.datasets, plans, 64)
        for row, plan in enumerate(plans):
            if plan.source == "long":
                place = 0
                for _, size in plan.spans:
                    assert (batch.starts[row, place : place + size] == place).all()
                    assert batch.targets[row, place + size - 1] == -100
                    place += size
    assert (seen == 1).all()
    assert runs.epochs(state)["long"] == 1
    plans, _ = runs.plan_step(state, 128, 2)
    assert {len(plan.spans) > 1 for plan in plans if plan.source == "long"} == {True}
    with pytest.raises(DataError, match="packed for a length of 64, of which the stage's 96"):
        runs.plan_step(state, 96, 2)


def test_plan_of_another_dataset_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "data", [20, 30])
    pack(tmp_path / "data", tmp_path / "plan", 64)
    (tmp_path / "data").rename(tmp_path / "old")
    write_corpus(tmp_path / "data", [20, 31])
    with pytest.raises(DataError, match="was packed for a dataset with fingerprint"):
        TokenDataset(tmp_path / "plan")
    with pytest.raises(DataError, match="is not empty"):
        pack(tmp_path / "data", tmp_path / "plan", 64)


@pytest.mark.parametrize("name", ["plan.json", "rows.i64", "starts.i64", "lengths.i32"])
def test_damaged_plan_is_refused(tmp_path: Path, name: str) -> None:
    dataset = write_corpus(tmp_path / "data", [20, 30, 50])
    pack(tmp_path / "data", tmp_path / "plan", 64)
    path = tmp_path / "plan" / name
    raw = path.read_bytes()
    path.write_bytes(raw[:-3])
    with pytest.raises(DataError):
        TokenDataset(tmp_path / "plan")
    path.write_bytes(b"\xff" * len(raw))
    with pytest.raises(DataError):
        plan = TokenDataset(tmp_path / "plan").plan
        assert plan is not None
        for row in range(plan.info.rows):
            plan.row(row, dataset.tokens)


def test_chunks_do_not_change_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    write_corpus(tmp_path / "data", draw.integers(2, 200, 300).tolist(), shard_tokens=2000)
    pack(tmp_path / "data", tmp_path / "a", 128)
    monkeypatch.setattr(pack_module, "CHUNK_DOCUMENTS", 7)
    pack(tmp_path / "data", tmp_path / "b", 128)
    for name in ("plan.json", "rows.i64", "starts.i64", "lengths.i32"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
