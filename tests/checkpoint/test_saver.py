"""Saving beside the training: what is written is one moment's state, whatever happens meanwhile."""

import errno
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megahybrid.checkpoint import durable, host_copy, names
from megahybrid.checkpoint.collective import Ranks
from megahybrid.checkpoint.folders import Retention, candidates
from megahybrid.checkpoint.fragments import Fragment, whole
from megahybrid.checkpoint.host_copy import HostCopy
from megahybrid.checkpoint.latest import latest
from megahybrid.checkpoint.rank_file import RankFile
from megahybrid.checkpoint.saver import Saver
from megahybrid.checkpoint.writer import SaveResult
from megahybrid.errors import CheckpointError
from tests.checkpoint.examples import save_plain, snapshot, together
from tests.checkpoint.test_interruptions import content_is_of_its_step

KEEP = Retention(9)


class Gate:
    """Holds back every writing of fragments until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        real = RankFile.write

        def write(own: RankFile, folder: Path) -> Any:
            assert self.open.wait(30)
            return real(own, folder)

        monkeypatch.setattr(RankFile, "write", write)


def saver(run: Path, told: list[SaveResult], **words: Any) -> Saver:
    return Saver(run, words.pop("ranks", Ranks()), told.append, **words)


def finish_by_polling(one: Saver, told: list[SaveResult], count: int = 1) -> None:
    until = time.monotonic() + 30
    while len(told) < count and time.monotonic() < until:
        one.poll()
        time.sleep(0.002)


def test_what_is_written_is_the_state_at_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, told = Gate(monkeypatch), []
    one, now = saver(tmp_path, told), snapshot(5)
    assert one.start(now, KEEP) is None
    for part in now.fragments:
        part.data[:] = -1.0
    one.poll()
    assert not told and candidates(tmp_path) == []
    gate.open.set()
    finish_by_polling(one, told)
    (result,) = told
    assert result.path == latest(tmp_path) and content_is_of_its_step(result.path)
    assert result.checked_seconds >= result.seconds > result.stall_seconds > 0


def test_the_next_save_waits_for_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, told = Gate(monkeypatch), []
    one = saver(tmp_path, told)
    one.start(snapshot(1), KEEP)
    begun = time.monotonic()
    threading.Timer(1, gate.open.set).start()
    one.start(snapshot(2), KEEP)
    assert [result.step for result in told] == [1] and time.monotonic() - begun > 0.15
    assert told[0].stall_seconds > 0.15, "waiting for it is a stall as well"
    one.finish()
    one.finish()
    assert [result.step for result in told] == [1, 2]
    assert all(content_is_of_its_step(path) for path in candidates(tmp_path))


def test_a_save_at_once_follows_one_that_is_under_way(tmp_path: Path) -> None:
    told: list[SaveResult] = []
    one = saver(tmp_path, told)
    one.start(snapshot(1), KEEP)
    assert one.save(snapshot(2), KEEP) is told[1]
    assert latest(tmp_path) == names.published_path(tmp_path, 2)


def test_several_ranks_publish_at_a_common_boundary(tmp_path: Path) -> None:
    parts = snapshot(3).fragments

    def rank(ranks: Ranks) -> list[SaveResult]:
        told: list[SaveResult] = []
        one = saver(tmp_path, told, ranks=ranks)
        one.start(snapshot(3, parts[ranks.rank :: ranks.count]), KEEP)
        boundaries = 0
        # The same number of polls everywhere: each is an exchange.
        while not all(ranks.gather(bool(told))):
            one.poll()
            boundaries += 1
        assert boundaries >= 4  # a phase ends at a boundary, never between two
        return told

    for (result,) in together(3, rank):
        assert result.path == latest(tmp_path)
    assert content_is_of_its_step(names.published_path(tmp_path, 3))


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (TypeError("a mistake"), "rank 1 could not save: TypeError: a mistake"),
        (CheckpointError("taken over."), "taken over."),
    ],
    ids=["full_disk", "mistake", "taken_over"],
)
def test_a_failure_on_one_rank_is_all_ranks_outcome(
    failure: Exception, raised: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = save_plain(tmp_path, 1)
    real, parts = RankFile.write, snapshot(2).fragments

    def write(own: RankFile, folder: Path) -> Any:
        if own.name == "fragments-0001.safetensors":
            raise failure
        return real(own, folder)

    monkeypatch.setattr(RankFile, "write", write)

    def rank(ranks: Ranks) -> Any:
        told: list[SaveResult] = []
        one = saver(tmp_path, told, ranks=ranks)
        try:
            one.start(snapshot(2, parts[ranks.rank :: 2]), KEEP)
            one.finish()
        except (CheckpointError, RuntimeError) as error:
            one.finish()  # nothing is under way any more
            return str(error)
        return told[0].error

    answers = together(2, rank)
    assert answers == [raised or "rank 1: No space left on device"] * 2
    assert [path.name for path in before.parent.iterdir()] == [before.name]


def test_a_run_that_was_taken_over_saves_nothing_on_any_rank(tmp_path: Path) -> None:
    def taken() -> None:
        raise CheckpointError("directory=x was taken over.")

    def rank(ranks: Ranks) -> str:
        one = saver(tmp_path, [], ranks=ranks, check=taken if ranks.rank == 0 else None)
        with pytest.raises(CheckpointError) as caught:
            one.start(snapshot(2, snapshot(2).fragments[ranks.rank :: 2]), KEEP)
        return str(caught.value)

    assert together(2, rank) == ["directory=x was taken over."] * 2
    assert candidates(tmp_path) == []


def test_fragments_with_a_gap_are_refused_when_they_are_joined(tmp_path: Path) -> None:
    one = saver(tmp_path, [])
    one.start(snapshot(1, snapshot(1).fragments[1:]), KEEP)
    with pytest.raises(CheckpointError, match="step 1 cannot be saved: embedding.weight"):
        one.finish()
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_training_waits_for_the_copy_and_not_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk of 0.2 s a file: of the whole save, training waits for less than a tenth."""
    real = durable.write

    def slow(path: Path, chunks: Any) -> Any:
        time.sleep(0.2)
        return real(path, chunks)

    monkeypatch.setattr(durable, "write", slow)
    told: list[SaveResult] = []
    one = saver(tmp_path, told)
    for step in (1, 2, 3):
        one.start(snapshot(step), KEEP)
        finish_by_polling(one, told, step)
    best = min(told, key=lambda result: result.stall_seconds)
    assert best.seconds > 0.4 and best.stall_seconds < 0.1 * best.seconds


def test_a_process_that_ends_mid_save_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = save_plain(tmp_path, 1)
    gate = Gate(monkeypatch)
    saver(tmp_path, []).start(snapshot(2), KEEP)  # and never polled again
    assert latest(tmp_path) == before
    gate.open.set()
    monkeypatch.undo()
    time.sleep(0.1)
    assert latest(tmp_path) == before
    save_plain(tmp_path, 3)
    assert {path.name for path in before.parent.iterdir()} == {"step-00000001", "step-00000003"}


def test_the_copy_is_made_in_the_same_memory_each_time() -> None:
    memory, data = HostCopy(), torch.arange(6, dtype=torch.float32)
    parts = [
        Fragment("a", "weight", whole((4,)), (0, 4), data[:4]),
        Fragment("b", "weight", whole((2,)), (0, 2), data[4:].numpy()),
    ]
    first = memory.take(parts)
    places = [part.data.__array_interface__["data"] for part in first]
    data += 1
    assert [part.data.tolist() for part in first] == [[0, 1, 2, 3], [4, 5]]
    second = memory.take(parts)
    assert [part.data.__array_interface__["data"] for part in second] == places
    assert second[0].data.tolist() == [1, 2, 3, 4]
    with pytest.raises(TypeError, match="b: torch.float64"):
        memory.take([replace(parts[1], data=np.zeros(2))])


def test_a_device_s_share_comes_through_a_few_locked_pieces_whatever_its_size() -> None:
    """What a device is asked, without one: copies that arrive late, in order, piece by piece."""
    late: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Event:
        def record(self) -> None:
            self.upto = len(late)

        def synchronize(self) -> None:
            for room, source in late[: self.upto]:
                room.copy_(source)

    class Room(torch.Tensor):
        def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            assert non_blocking
            late.append((self.as_subclass(torch.Tensor), source.clone()))
            return self

    ring = host_copy._PinnedRing(torch.device("cpu"), chunk=4, chunks=2)
    ring._buffers = [room.as_subclass(Room) for room in ring._buffers]
    ring._arrived = [Event(), Event()]  # type: ignore[list-item]
    sizes = (1, 4, 5, 17, 0, 8)
    sources = [torch.randn(size) for size in sizes]
    places = [torch.full((size,), float("nan")) for size in sizes]
    for source, place in zip(sources, places, strict=True):
        ring.start_copy(source, place)
    ring.empty()
    assert all(torch.equal(a, b) for a, b in zip(sources, places, strict=True))
    assert ring.bytes == 2 * 4 * 4


def test_locked_memory_is_of_a_size_that_the_allocator_does_not_round_up() -> None:
    assert host_copy.CHUNK_ELEMENTS * 4 & (host_copy.CHUNK_ELEMENTS * 4 - 1) == 0
    assert host_copy._PinnedRing(torch.device("cpu")).bytes == 2**27
