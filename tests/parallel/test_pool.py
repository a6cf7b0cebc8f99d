"""The pool of workers that the distributed tests stand on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankFailed, Ranks, run


def _sum_of_ranks(ranks: Ranks, offset: int) -> tuple[int, int, float]:
    total = torch.tensor(float(ranks.rank + offset))
    dist.all_reduce(total)
    return os.getpid(), ranks.rank, total.item()


def _raise_on_last_rank(ranks: Ranks) -> None:
    if ranks.rank == ranks.world_size - 1:
        raise ValueError("this one")
    dist.barrier()  # the others are still waiting when the error arrives


def _hang_on_rank_0(ranks: Ranks) -> None:
    if ranks.rank == 0:
        time.sleep(1000)
    dist.barrier()


def _die_on_rank_0(ranks: Ranks) -> None:
    if ranks.rank == 0:
        os._exit(7)
    dist.barrier()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_results_come_back_by_rank_and_workers_are_reused() -> None:
    first, second = run(2, _sum_of_ranks, 10), run(2, _sum_of_ranks, 20)
    assert [rank for _, rank, _ in first] == [0, 1]
    assert [total for _, _, total in first + second] == [21.0, 21.0, 41.0, 41.0]
    assert [pid for pid, _, _ in first] == [pid for pid, _, _ in second]


@pytest.mark.parametrize(
    ("function", "rank", "words"),
    [
        (_raise_on_last_rank, 1, "ValueError: this one"),
        (_hang_on_rank_0, 0, "_hang_on_rank_0"),  # the stack of the rank that hangs
        (_die_on_rank_0, None, "rank"),
    ],
    ids=["raises", "hangs", "dies"],
)
def test_failing_rank_is_named_and_the_pool_rebuilt_without_orphans(
    function: object, rank: int | None, words: str
) -> None:
    pids = [pid for pid, _, _ in run(2, _sum_of_ranks, 0)]
    with pytest.raises(RankFailed, match=words) as failure:
        run(2, function, timeout_seconds=5)  # type: ignore[arg-type]
    assert rank is None or failure.value.rank == rank
    assert not any(_alive(pid) for pid in pids)
    assert [total for _, _, total in run(2, _sum_of_ranks, 0)] == [1.0, 1.0]


SESSION = """
from tests import distributed
from tests.distributed import run
from tests.parallel.test_pool import _hang_on_rank_0, _print_pid

distributed.PRELOADED = ["torch"]  # no more is needed here
if __name__ == "__main__":
    print(*run(2, _print_pid), flush=True)
    run(2, _hang_on_rank_0)
"""


def _print_pid(ranks: Ranks) -> int:
    return os.getpid()


def test_workers_end_when_the_session_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "session.py"
    script.write_text(SESSION)
    session = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert session.stdout is not None
    pids = [int(pid) for pid in session.stdout.readline().split()]
    assert len(pids) == 2
    session.send_signal(signal.SIGKILL)
    session.wait()
    until = time.monotonic() + 20
    while any(_alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.2)
    assert not any(_alive(pid) for pid in pids)
