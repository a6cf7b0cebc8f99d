"""Targets that a dataset's own mask leaves out do not count; everything is still seen."""

from pathlib import Path

import numpy as np
import pytest

from megahybrid.data.batches import IGNORED, make_batch
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.manifest import TokenizerInfo
from megahybrid.data.mixture import RowPlan
from megahybrid.data.token_writer import TokenWriter
from megahybrid.data.verify import verify_dataset
from megahybrid.data_prep.rewrite import export_dataset
from megahybrid.errors import DataError

INFO = TokenizerInfo(kind="test", sha256="0" * 64, vocab_size=50, eod_id=1)


@pytest.fixture
def drawn(tmp_path: Path) -> tuple[TokenDataset, np.ndarray]:
    """Documents over several shards, some with a mask, and which tokens count."""
    draw = np.random.default_rng(0)
    counts: list[np.ndarray] = []
    with TokenWriter(tmp_path / "data", INFO, shard_tokens=40) as writer:
        for number in range(20):
            size = int(draw.integers(3, 12))
            told = draw.random(size) < 0.4 if number % 3 else None
            writer.add(draw.integers(2, 50, size), told)
            asked = np.ones(size + 1, bool) if told is None else np.append(told, False)
            counts.append(asked)
    return TokenDataset(tmp_path / "data"), np.concatenate(counts)


def test_uncounted_tokens_are_those_written_so_over_shards_and_bytes(
    drawn: tuple[TokenDataset, np.ndarray],
) -> None:
    dataset, counts = drawn
    assert len(dataset.shards) > 2 and len(counts) == dataset.tokens
    for start in range(0, dataset.tokens - 1, 3):
        for size in (1, 9, min(50, dataset.tokens - start)):
            expected = np.flatnonzero(~counts[start : start + size])
            found = dataset.uncounted(start, min(size, dataset.tokens - start))
            assert np.array_equal(found, expected)


def test_batches_leave_out_masked_targets_and_keep_every_input(
    drawn: tuple[TokenDataset, np.ndarray],
) -> None:
    dataset, counts = drawn
    plain = np.concatenate([dataset.document(n) for n in range(dataset.documents)])
    plans = [RowPlan("a", ((3, 16),)), RowPlan("a", ((60, 10), (20, 6))), RowPlan("a", ((90, 4),))]
    batch = make_batch({"a": dataset}, plans, 16)
    assert np.array_equal(batch.tokens[0], plain[3:19])
    for row, places in enumerate([range(3, 19), range(60, 69), range(90, 94)]):
        for column, place in enumerate(places):
            follows = plain[place] != INFO.eod_id and counts[place + 1]
            wanted = plain[place + 1] if follows else IGNORED
            assert batch.targets[row, column] == wanted
    # The last token before a join has no target, whatever the token behind it on disk says.
    assert batch.targets[1, 9] == IGNORED
    assert (batch.targets[0] == IGNORED).sum() > 4


def test_damaged_and_foreign_masks_are_refused(
    drawn: tuple[TokenDataset, np.ndarray], tmp_path: Path
) -> None:
    dataset, _ = drawn
    verify_dataset(dataset.path)
    with pytest.raises(DataError, match=r"\.mask\), which Megatron's files would lose"):
        export_dataset(dataset.path, tmp_path / "out")
    path = dataset.masks[0].path
    kept = path.read_bytes()
    path.write_bytes(bytes([kept[0] ^ 1]) + kept[1:])
    with pytest.raises(DataError, match=r"mask has crc32 \d+, not \d+"):
        verify_dataset(dataset.path)
    path.write_bytes(kept[:-1])
    with pytest.raises(DataError, match=r"mask has \d bytes, not \d \(a bit for each of"):
        TokenDataset(dataset.path)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        TokenDataset(dataset.path)


def test_counts_of_another_length_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(
            DataError, match=r"counts has 2 entries, not one per token \(3, eod left out"
        ),
        TokenWriter(tmp_path / "data", INFO) as writer,
    ):
        writer.add([2, 3, 4], np.ones(2, bool))


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "data", INFO, has_metadata=True) as writer:
        two = (np.asarray([2, 1, 3, 1]), np.asarray([2, 2]))
        with pytest.raises(DataError, match=r"counts has 3 entries, not one per token \(4\)"):
            writer.add_documents(*two, counts=np.ones(3, bool))
        with pytest.raises(
            DataError, match=r"metadata_lines has 1 entries, not one per document \(2\)"
        ):
            writer.add_documents(*two, metadata_lines=[b"{}"])
        with pytest.raises(DataError, match=r"metadata b'\{\\n\}' is not one line"):
            writer.add_documents(*two, metadata_lines=[b"{}", b"{\n}"])
        with pytest.raises(DataError, match=r"metadata b'\{\\n\}' is not one line"):
            writer.add_long([two[0][:2]], 2, b"{\n}")
        writer.add_documents(*two, metadata_lines=[b'{"a":1}', b""])
    dataset = verify_dataset(tmp_path / "data")
    assert dataset.documents == 2 and dataset.metadata(0) == {"a": 1}


@pytest.mark.parametrize("eod_counts", [False, True])
def test_caller_says_whether_the_end_of_a_document_counts(tmp_path: Path, eod_counts: bool) -> None:
    """An answer's end is learnt, a prompt's is not: both are eod."""
    with TokenWriter(tmp_path / "data", INFO) as writer:
        writer.add([5, 6, 7], [False, True, True], eod_counts=eod_counts)
        writer.add([8, 9], np.zeros(2, bool))
    dataset = verify_dataset(tmp_path / "data")
    batch = make_batch({"a": dataset}, [RowPlan("a", ((0, 6),))], 6)
    last = INFO.eod_id if eod_counts else IGNORED
    assert batch.targets[0].tolist() == [6, 7, last, IGNORED, IGNORED, IGNORED]
