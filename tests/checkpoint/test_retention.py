"""Which checkpoints stay."""

from pathlib import Path

import pytest

from megahybrid.checkpoint.folders import Retention, apply_retention, candidates, remove_leftovers
from megahybrid.checkpoint.latest import latest
from megahybrid.checkpoint.reader import quick_check
from tests.checkpoint.examples import save_plain
from tests.checkpoint.test_damage import FILE, flip, truncate


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_newest_stay(tmp_path: Path) -> None:
    for step in (1, 2, 5, 30):
        save_plain(tmp_path, step, keep_last=2)
    assert names(tmp_path) == ["step-00000005", "step-00000030"]


def test_the_last_one_that_verifies_is_never_deleted(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_plain(tmp_path, step)
    flip(tmp_path / "checkpoints" / "step-00000003" / FILE, -1)
    assert apply_retention(tmp_path, Retention(keep_last=1)) == ["step-00000001"]
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    assert latest(tmp_path, lambda line: None) == tmp_path / "checkpoints" / "step-00000002"


def test_nothing_is_deleted_when_nothing_verifies(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        flip(save_plain(tmp_path, step) / FILE, -1)
    assert apply_retention(tmp_path, Retention(keep_last=1)) == []


def test_damaged_ones_do_not_count_and_go_when_old(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_plain(tmp_path, step)
    truncate(tmp_path / "checkpoints" / "step-00000004" / FILE)
    save_plain(tmp_path, 5, keep_last=2)
    assert names(tmp_path) == ["step-00000003", "step-00000004", "step-00000005"]
    save_plain(tmp_path, 6, keep_last=2)
    assert names(tmp_path) == ["step-00000005", "step-00000006"]


def test_a_save_after_a_fallback_replaces_the_damaged_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2):
        save_plain(tmp_path, step)
    newest = tmp_path / "checkpoints" / "step-00000002"
    truncate(newest / FILE)
    assert save_plain(tmp_path, 2) == newest == latest(tmp_path)


def test_whatever_stands_in_the_place_of_a_checkpoint_does_not_keep_a_save_out(
    tmp_path: Path,
) -> None:
    """A file, a link to nothing, and a link to a whole one elsewhere, which is left as it is."""
    place, elsewhere = tmp_path / "checkpoints" / "step-00000001", tmp_path / "elsewhere"
    save_plain(tmp_path, 1).rename(elsewhere)
    for make in (Path.touch, lambda at: at.symlink_to("gone"), lambda at: at.symlink_to(elsewhere)):
        make(place)
        assert save_plain(tmp_path, 1) == place == latest(tmp_path) and not place.is_symlink()
        assert names(tmp_path) == ["step-00000001"]
        place.rename(place.with_name(".step-00000001.tmp"))
    assert quick_check(elsewhere) is None


def test_steps_beyond_eight_digits_are_the_newest(tmp_path: Path) -> None:
    save_plain(tmp_path, 99_999_999)
    assert save_plain(tmp_path, 100_000_000) == latest(tmp_path)


def test_keeping_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_last=0"):
        apply_retention(tmp_path, Retention(keep_last=0))


def test_what_is_not_a_checkpoint_is_left_alone(tmp_path: Path) -> None:
    save_plain(tmp_path, 1)
    for name in ("step-1", "step-00000001.bak", "notes", ".step-00000001"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "step-00000009").write_text("a file")
    assert [path.name for path in candidates(tmp_path)] == ["step-00000001"]
    assert remove_leftovers(tmp_path) == [] and len(names(tmp_path)) == 6


def test_every_so_many_steps_and_the_best_stay(tmp_path: Path) -> None:
    for step in range(1, 10):
        save_plain(tmp_path, step)
    scores = {2: 3.0, 5: 2.5, 7: 2.5, 9: 4.0, 100: 0.1}
    removed = apply_retention(tmp_path, Retention(keep_last=1, keep_every_steps=4, scores=scores))
    # Of equals the newer one; a score without a checkpoint is no checkpoint.
    assert names(tmp_path) == [f"step-0000000{step}" for step in (4, 7, 8, 9)]
    assert removed == [f"step-0000000{step}" for step in (6, 5, 3, 2, 1)]


def test_a_damaged_best_gives_its_place_to_the_next(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_plain(tmp_path, step)
    truncate(tmp_path / "checkpoints" / "step-00000001" / FILE)
    apply_retention(tmp_path, Retention(keep_last=1, scores={1: 1.0, 2: 2.0, 3: 3.0}))
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
