"""Files that change, or were damaged, under a dataset that is open."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megahybrid.data import integrity
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.loader import StepShape, read_step
from megahybrid.data.mixture import Mixture
from megahybrid.errors import DataError
from tests.data.corpus import write_corpus


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def edit(path: Path) -> None:
    raw = np.memmap(path, np.uint8, mode="r+")
    raw[5] ^= 1
    raw.flush()
    os.utime(path, (1, 1))


def swap(path: Path) -> None:
    facts, copy = path.stat(), path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes()[::-1])
    os.utime(copy, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    copy.replace(path)


@pytest.mark.parametrize(
    "change, message",
    [
        (shorten, r"shard-00000.bin has 107 bytes, not 214 as when it was opened"),
        (edit, r"shard-00000.bin was changed at 1970-01-01T00:00:01.000\+00:00, not 20\d\d-"),
        (swap, r"shard-00000.bin is another file \(inode \d+, not \d+\)"),
        (Path.unlink, r"shard-00000.bin cannot be read \(No such file"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_file_changed_under_a_run_is_refused_before_it_is_read(
    tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    dataset = write_corpus(tmp_path / "web", [60, 7, 40])
    runs = Mixture({"web": dataset}, {"web": 1}, seed=0, block_tokens=32, lanes=2)
    state = read_step(runs, runs.start(), StepShape(16, 2, 2)).state
    change(tmp_path / "web/shard-00000.bin")
    with pytest.raises(DataError, match=message):
        read_step(runs, state, StepShape(16, 2, 2))


def test_only_the_files_of_the_rows_are_looked_at(tmp_path: Path) -> None:
    dataset = write_corpus(tmp_path, [60, 60, 60], shard_tokens=64)
    (tmp_path / "shard-00001.bin").unlink()
    dataset.check_unchanged([(0, 60), (120, 60)])
    for spans in ([(59, 2)], [(0, 180)], [(60, 1)], [(119, 1)]):
        with pytest.raises(DataError, match="shard-00001.bin"):
            dataset.check_unchanged(spans)


def test_damage_is_found_at_open_or_while_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path, [60] * 50, block_bytes=64)
    raw = np.memmap(tmp_path / "shard-00000.bin", np.uint16, mode="r+")
    raw[1000] ^= 1
    raw.flush()
    found = 0
    for _ in range(200):  # 4 of 94 blocks are tried at each open
        try:
            TokenDataset(tmp_path)
        except DataError as error:
            assert "block 31 (bytes from 1984) has crc32" in str(error)
            found += 1
    assert 0 < found < 60
    monkeypatch.setattr(integrity, "TRIED_BLOCKS", 0)
    monkeypatch.setattr(integrity, "CHECKED_SHARE", 1)
    dataset = TokenDataset(tmp_path)
    with pytest.raises(DataError, match="block 31"):
        for start in range(0, 3000, 20):
            dataset.read(start, 20)


def test_foreign_file_of_the_same_size_is_another(tmp_path: Path) -> None:
    write_corpus(tmp_path, [60, 7])
    (tmp_path / "manifest.json").unlink()
    before = TokenDataset(tmp_path, vocab_size=1000).fingerprint
    raw = np.memmap(tmp_path / "shard-00000.bin", np.uint16, mode="r+")
    raw[5] ^= 1
    raw.flush()
    assert TokenDataset(tmp_path, vocab_size=1000).fingerprint != before


def test_file_shortened_between_the_look_and_the_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write_corpus(tmp_path / "web", [60, 7, 40])
    runs = Mixture({"web": dataset}, {"web": 1}, seed=0, block_tokens=32, lanes=2)
    state = read_step(runs, runs.start(), StepShape(16, 2, 2)).state
    monkeypatch.setattr(dataset, "check_unchanged", lambda spans: None)
    shorten(tmp_path / "web/shard-00000.bin")
    with pytest.raises(DataError, match=r"shard-00000.bin ends at byte 107, not 214 as when it"):
        for _ in range(4):
            state = read_step(runs, state, StepShape(16, 2, 2)).state
