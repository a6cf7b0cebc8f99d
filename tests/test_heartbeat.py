"""What a rank says about itself, and what is concluded from it."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megahybrid.heartbeat import (
    PHASES,
    Beat,
    HangDetector,
    Heartbeat,
    clear,
    first_failure,
    heartbeat_file,
    read_beats,
    slow_ranks,
)

LIMITS = dict.fromkeys(PHASES, 100.0) | {"data": 20.0}


def _beats(*changes: dict) -> dict[int, Beat]:
    return {
        rank: replace(Beat(rank, f"n{rank}", 1, beats=1, phase="step", step=5), **change)
        for rank, change in enumerate(changes)
    }


def test_a_heartbeat_says_phase_step_and_end(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path, 3, beat_seconds=0.02).start()
    assert read_beats(tmp_path)[3].phase == "start"
    heart.phase("step", 7)
    with heart.during("save"):
        time.sleep(0.1)
        assert (read_beats(tmp_path)[3].phase, read_beats(tmp_path)[3].step) == ("save", 7)
    for seconds in (1.0, 3.0, 2.0):
        heart.busy(seconds)
    heart.end(75, "stopped", consequence=True)
    beat = read_beats(tmp_path)[3]
    assert (beat.phase, beat.exit_code, beat.message, beat.consequence, beat.busy_seconds) == (
        "step", 75, "stopped", True, 2.0,
    )  # fmt: skip
    time.sleep(0.1)
    assert read_beats(tmp_path)[3].beats == beat.beats
    clear(tmp_path)
    assert read_beats(tmp_path) == {}


def test_a_half_written_or_foreign_file_is_no_beat(tmp_path: Path) -> None:
    Heartbeat(tmp_path, 0).start().end(0)
    heartbeat_file(tmp_path, 1).write_text('{"rank": 1, "ho')
    known = json.loads(heartbeat_file(tmp_path, 0).read_text())
    heartbeat_file(tmp_path, 2).write_text(json.dumps(known | {"rank": 2, "newer": 1}))
    assert list(read_beats(tmp_path)) == [0, 2]


def test_a_full_disk_does_not_end_the_rank(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path, 0, beat_seconds=0.01).start()
    heart.path.parent.rename(tmp_path / "gone")
    time.sleep(0.05)
    heart.phase("data", 1)
    heart.end(0)


def test_ranks_that_beat_and_move_do_not_hang() -> None:
    watch = HangDetector(2, LIMITS, 10)
    for second in range(500):
        beats = _beats({"beats": second}, {"beats": second})
        assert watch.judge(beats, time.monotonic() + second) is None


def test_a_silent_rank_is_named_by_the_watchers_own_clock() -> None:
    watch, now = HangDetector(3, LIMITS, 10), time.monotonic()
    watch.judge(_beats({}, {}, {}), now)
    assert watch.judge(_beats({"beats": 2}, {}, {"beats": 2}), now + 9) is None
    hang = watch.judge(_beats({"beats": 3}, {}, {"beats": 3}), now + 11)
    assert hang is not None and hang.ranks == (1,)
    assert hang.message == "rank 1 sent no heartbeat for 11 s (phase step, step 5, on n1)"


def test_of_ranks_that_wait_the_one_behind_is_named() -> None:
    waiting = {"phase_seconds": 120.0}
    stuck = {"phase_seconds": 130.0, "phase": "data"}
    hang = HangDetector(3, LIMITS, 10).judge(_beats(waiting, waiting, stuck))
    assert hang is not None and hang.ranks == (2,)
    assert "rank 2 made no progress for 130 s (phase data, step 5, on n2)" in hang.message


def test_each_phase_has_its_own_limit() -> None:
    assert HangDetector(1, LIMITS, 10).judge(_beats({"phase_seconds": 50.0})) is None
    assert HangDetector(1, LIMITS, 10).judge(_beats({"phase_seconds": 50.0, "phase": "data"}))


def test_ranks_that_never_began_are_named() -> None:
    watch = HangDetector(4, LIMITS, 10)
    beats = _beats({}, {})
    assert watch.judge(beats, time.monotonic() + 5) is None
    hang = HangDetector(4, LIMITS, 1000).judge(beats, time.monotonic() + 101)
    assert hang is not None and hang.message == "ranks 2, 3 did not start in 100 s"


def test_a_rank_that_ended_is_silent_for_good_reason() -> None:
    watch, now = HangDetector(2, LIMITS, 10), time.monotonic()
    beats = _beats({"exit_code": 75}, {"exit_code": 75})
    watch.judge(beats, now)
    assert watch.judge(beats, now + 1000) is None


def test_the_cause_is_no_consequence() -> None:
    beats = _beats({"exit_code": 1, "consequence": True}, {"exit_code": 93}, {"exit_code": 0})
    cause = first_failure(beats)
    assert cause is not None and cause.rank == 1
    assert first_failure(_beats({"exit_code": 0}, {})) is None


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [((1.0, 1.2, 1.1, 1.0), []), ((1.0, 1.0, 1.5, 1.0), [2]), ((1.0, 1.5), [1]), ((9.0,), [])],
)
def test_a_slow_rank_is_over_1_3_times_the_median(
    seconds: tuple[float, ...], slow: list[int]
) -> None:
    beats = _beats(*({"busy_seconds": one} for one in seconds))
    assert [beat.rank for beat, _ in slow_ranks(beats, 1.3)] == slow


def test_stacks_are_written_while_the_process_hangs(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; "
        "from megahybrid.heartbeat import write_stacks_on_signal; "
        "write_stacks_on_signal(Path(sys.argv[1])); print('ready', flush=True)\n"
        "def stuck():\n    time.sleep(60)\nstuck()"
    )
    file = tmp_path / "logs" / "stacks-0000.txt"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 30
        while "in stuck" not in file.read_text():
            assert time.monotonic() < deadline
            os.kill(process.pid, signal.SIGUSR2)  # the first may come before it is stuck
            time.sleep(0.1)
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_an_earlier_attempt_that_comes_back_leaves_the_later_ones_beats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hearts = []
    for attempt in ("9.2", "9.10", "10.0"):
        monkeypatch.setenv("MEGAHYBRID_LOGS", f"/logs/{attempt}")
        hearts.append(Heartbeat(tmp_path, 0, beat_seconds=0.01).start())
        assert read_beats(tmp_path, attempt)[0].attempt == attempt
        assert read_beats(tmp_path, "9.9") == {}
    time.sleep(0.1)
    assert read_beats(tmp_path)[0].attempt == "10.0"
    for heart in hearts[:2]:
        heart.end(1, "late")
    assert read_beats(tmp_path)[0].exit_code is None
    hearts[2].end(0)
