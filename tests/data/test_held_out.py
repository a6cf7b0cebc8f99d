from pathlib import Path

import numpy as np
import pytest

from megahybrid.data.held_out import evaluation_plans
from tests.data.corpus import all_tokens, evaluation_batches, write_corpus

LENGTHS = [30, 7, 90, 100, 41, 3]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_stream_counts_each_target_once(tmp_path: Path, world_size: int) -> None:
    dataset = write_corpus(tmp_path, LENGTHS)
    ranks = [
        list(evaluation_batches(dataset, 32, 2, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    targets = np.concatenate([b.targets.ravel() for batches in ranks for b in batches])
    disk = all_tokens(dataset)
    expected = disk[1:][disk[:-1] != dataset.eod_id]
    assert sorted(targets[targets >= 0].tolist()) == sorted(expected.tolist())


def test_stream_rows_are_the_file_in_order(tmp_path: Path) -> None:
    dataset = write_corpus(tmp_path, LENGTHS)
    rows = np.concatenate([b.tokens for b in evaluation_batches(dataset, 32, 2)]).ravel()
    assert (rows[: dataset.tokens] == all_tokens(dataset)).all()


def test_rows_of_documents_begin_with_them(tmp_path: Path) -> None:
    dataset = write_corpus(tmp_path, LENGTHS)
    batches = list(evaluation_batches(dataset, 50, 1, rows="documents", min_tokens=30))
    spans = [(start, size) for start, size in dataset.document_spans() if size >= 30]
    spans.sort(key=lambda span: -min(span[1], 50))
    for batch, (start, size) in zip(batches, spans, strict=True):
        whole = dataset.read(start, size).tolist()
        used = min(size, 50)
        assert batch.tokens[0, :used].tolist() == whole[:used]
        assert not batch.starts.any()
        assert batch.targets[0, : used - 1].tolist() == whole[1:used]
        assert batch.targets[0, used - 1] == (whole[50] if size > 50 else -100)
        assert (batch.targets[0, used:] == -100).all()


def test_rows_of_documents_are_no_longer_than_they_must_be(tmp_path: Path) -> None:
    dataset = write_corpus(tmp_path, [65, 500, 3, 130, 64, 300, 1000, 260])
    batches = list(evaluation_batches(dataset, 768, 1, rows="documents", multiple=3))
    # 3 x 32 = 96 holds 65, 64 and 3; 192 holds 130; 384 holds 300 and 260; the rest are cut at 768.
    shapes = [batch.tokens.shape for batch in batches]
    assert shapes == [(1, 768), (1, 768), (2, 384), (1, 192), (3, 96)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_have_batches_of_the_same_shapes_and_each_document_once(
    tmp_path: Path, world_size: int
) -> None:
    dataset = write_corpus(tmp_path, LENGTHS)
    ranks = [
        list(evaluation_batches(dataset, 96, 2, rows="documents", rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({tuple(batch.tokens.shape for batch in batches) for batches in ranks}) == 1
    targets = np.concatenate([b.targets.ravel() for batches in ranks for b in batches])
    # The document of 100 tokens is cut: of its 99 targets that count the first 96 are scored.
    assert (targets >= 0).sum() == sum(min(length - 1, 96) for length in LENGTHS)


def test_half_of_a_budget_goes_to_the_longest_documents(tmp_path: Path) -> None:
    lengths = [20, 30, 400, 20, 30, 300, 20]
    dataset = write_corpus(tmp_path, lengths)
    plans = evaluation_plans(dataset, 512, "documents", max_tokens=799)
    assert [plan.spans[0][1] for plan in plans] == [400, 30, 30, 20, 20]
    plans = evaluation_plans(dataset, 512, "documents", max_tokens=1)
    assert [plan.spans[0][1] for plan in plans] == [400]
    plans = evaluation_plans(dataset, 512, "documents", max_tokens=2000)
    assert [plan.spans[0][1] for plan in plans] == sorted(lengths, reverse=True)


def test_budget_of_tokens_bounds_the_rows(tmp_path: Path) -> None:
    dataset = write_corpus(tmp_path, LENGTHS)
    assert sum(b.tokens.size for b in evaluation_batches(dataset, 32, 1, max_tokens=100)) == 96
    assert len(list(evaluation_batches(dataset, 32, 1, max_tokens=1))) == 1


def test_set_without_documents_gives_no_batches(tmp_path: Path) -> None:
    dataset = write_corpus(tmp_path, [])
    assert list(evaluation_batches(dataset, 32, 1)) == []
    assert list(evaluation_batches(dataset, 32, 1, rows="documents")) == []
