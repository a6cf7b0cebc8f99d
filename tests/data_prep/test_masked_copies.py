"""Merge, shuffle and split keep with each token whether it counts as a target."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megahybrid.data.dataset import TokenDataset
from megahybrid.data.manifest import TokenizerInfo
from megahybrid.data.target_mask import MaskBits
from megahybrid.data.token_writer import TokenWriter
from megahybrid.data.verify import verify_dataset
from megahybrid.data_prep import merge, rewrite
from megahybrid.data_prep.merge import Split
from megahybrid.data_prep.rewrite import merge_datasets, shuffle_datasets

INFO = TokenizerInfo(kind="test", sha256="0" * 64, vocab_size=50_000, eod_id=1)
Marked = dict[tuple[int, ...], tuple[bool, ...]]


def write(folder: Path, seed: int, masked: bool) -> Marked:
    """Documents that differ, one of them long; which of their tokens count, by their tokens."""
    draw = np.random.default_rng(seed)
    made: Marked = {}
    with TokenWriter(folder, INFO, shard_tokens=700) as writer:
        for number in range(60):
            tokens = draw.integers(2, 50_000, 500 if number == 30 else int(draw.integers(1, 40)))
            counts = draw.random(len(tokens)) < 0.5
            writer.add(tokens, counts if masked else None, eod_counts=bool(number % 2))
            told = (*counts.tolist(), bool(number % 2)) if masked else (True,) * (len(tokens) + 1)
            made[(*tokens.tolist(), 1)] = told
    return made


def read(path: Path) -> Marked:
    dataset, found, at = verify_dataset(path), Marked(), 0
    for index in range(dataset.documents):
        tokens = dataset.document(index)
        counts = np.ones(len(tokens), bool)
        counts[dataset.uncounted(at, len(tokens))] = False
        found[tuple(tokens.tolist())] = tuple(counts.tolist())
        at += len(tokens)
    return found


@pytest.fixture
def sources(tmp_path: Path) -> tuple[list[Path], Marked]:
    """A dataset with a mask, and one without, whose targets all count."""
    marked = write(tmp_path / "a", 0, True)
    return [tmp_path / "a", tmp_path / "b"], marked | write(tmp_path / "b", 1, False)


@pytest.mark.parametrize("piece", [2**22, 64], ids=["held", "long_in_pieces"])
def test_copies_have_the_masks_of_their_documents(
    sources: tuple[list[Path], Marked], tmp_path: Path, piece: int, monkeypatch: Any
) -> None:
    paths, marked = sources
    monkeypatch.setattr(rewrite, "PIECE_TOKENS", piece)
    monkeypatch.setattr(merge, "COPY_TOKENS", piece)
    merge_datasets(paths, tmp_path / "merged", shard_tokens=500)
    assert read(tmp_path / "merged") == marked
    shuffle_datasets(paths, tmp_path / "shuffled", memory_bytes=2**22 if piece > 64 else 2**10)
    assert read(tmp_path / "shuffled") == marked
    parts = Split(0.3, 2)
    made = shuffle_datasets(paths, tmp_path / "split", split=parts)
    found = [read(tmp_path / "split" / part) for part in made]
    assert len(found) == 3 and all(found)
    assert found[0] | found[1] | found[2] == marked


def test_datasets_without_masks_stay_without(tmp_path: Path) -> None:
    write(tmp_path / "plain", 1, False)
    merge_datasets([tmp_path / "plain"], tmp_path / "merged")
    shuffle_datasets([tmp_path / "plain"], tmp_path / "shuffled")
    for name in ("merged", "shuffled"):
        assert not TokenDataset(tmp_path / name).masked


def test_mask_is_packed_the_same_whatever_it_comes_in(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    bits, told = MaskBits(), []
    for number in range(200):
        size = int(draw.integers(1, 20))
        counts = draw.random(size) < 0.5 if number > 5 and number % 3 else None
        bits.add(size, counts)
        told.append(np.ones(size, bool) if counts is None else counts)
    whole = np.concatenate(told)
    assert bits.finish() == np.packbits(whole, bitorder="little").tobytes()
    with TokenWriter(tmp_path / "data", INFO) as writer:
        writer.add_long([np.asarray([5, 6]), np.asarray([7, 1])], 4, counts=iter(np.eye(2) > 0))
    dataset = verify_dataset(tmp_path / "data")
    assert dataset.uncounted(0, 4).tolist() == [1, 2]
    assert dataset.masks[0].counted() == 2
