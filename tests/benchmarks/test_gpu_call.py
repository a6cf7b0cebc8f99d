"""A call on a GPU loses nothing: parts that die, are killed, or end the script leave every earlier
line, and the next call goes on behind them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_call import __main__ as call
from benchmarks.gpu_call.parts import Part, parts
from benchmarks.gpu_call.process import KILLED, run_part
from benchmarks.gpu_call.results import NAME, Results, ended, lost, read, rows
from benchmarks.gpu_call.setting import Setting
from benchmarks.gpu_call.table import table
from tests.benchmarks.lent import make_python

ROOT = Path(__file__).parents[2]
WRITES = """
import os, sys, time, signal
out = os.fdopen(int(sys.argv[sys.argv.index("--rows-fd") + 1]), "w", buffering=1)
what = sys.argv[1]
print('{"figure": 1}', file=out, flush=True)
print("said on the way")
if what == "dies":
    os.abort()
if what == "hangs":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        time.sleep(600)
    time.sleep(600)
if what == "leaves":
    if os.fork() == 0:
        time.sleep(600)
print('{"figure": 2}', file=out, flush=True)
"""


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that behaves as a part may."""
    (tmp_path / "part_that.py").write_text(WRITES)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    return tmp_path


def figures(path: Path) -> list[int]:
    return [row["figure"] for row in rows(list(read(path)))]


def run(folder: Path, what: str, limit: float = 60.0) -> int:
    results = Results(folder / NAME)
    command = ("part_that", what)
    return run_part(what, command, limit, results, folder / "log.txt", rows=True)


def test_a_part_s_figures_are_kept_and_its_last_words_are_told(written: Path) -> None:
    assert run(written, "works") == 0
    assert figures(written / NAME) == [1, 2]
    end = [line for line in read(written / NAME) if line.kind == "end"][-1]
    assert end.detail["rc"] == 0 and end.detail["tail"] == "said on the way"


def test_a_part_that_aborts_leaves_what_it_had_measured(written: Path) -> None:
    assert run(written, "dies") == -signal.SIGABRT
    assert figures(written / NAME) == [1]
    assert "dies: exit code -6: said on the way" in table(list(read(written / NAME)))


def test_a_part_over_its_limit_is_killed_with_all_that_it_started(written: Path) -> None:
    began = time.monotonic()
    assert run(written, "hangs", limit=3.0) == KILLED
    assert time.monotonic() - began < 20
    assert figures(written / NAME) == [1]
    assert "over its 3 s" in table(list(read(written / NAME)))
    assert running("part_that hangs") == []


def test_what_a_part_left_running_does_not_hold_the_call(written: Path) -> None:
    began = time.monotonic()
    assert run(written, "leaves") == 0
    assert time.monotonic() - began < 20
    assert figures(written / NAME) == [1, 2]
    assert running("part_that leaves") == []


def running(words: str) -> list[str]:
    """Command lines of processes with these words that are no zombies."""
    deadline = time.monotonic() + 5
    while True:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                said = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if words in said:
                found.append(said)
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def test_a_torn_line_ends_alone(tmp_path: Path) -> None:
    path = tmp_path / NAME
    Results(path).add("one", "row", figure=1)
    with open(path, "ab") as file:
        file.write(b'{"part": "one", "kind": "ro')
    Results(path).add("one", "row", figure=2)
    assert figures(path) == [1, 2]


def planned(written: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    made = [Part(name, ("part_that", name), 60.0) for name in names]
    monkeypatch.setattr(call, "parts", lambda rehearse, results: made)


def test_the_next_call_goes_on_behind_the_last_and_asks_the_suspect_last(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = Results(written / NAME)
    results.add("works", "begin")
    results.add("works", "row", figure=7)
    results.add("works", "end", rc=0, tail="")
    results.add("first", "begin")  # and the machine went away
    assert lost(list(read(written / NAME))) == ["first"]
    planned(written, monkeypatch, "works", "first", "second", "dies")
    out = ["--out", str(written / "next"), "--after", str(written / NAME)]
    assert call.main(out) == 1
    lines = list(read(written / "next" / NAME))
    begun = [line.part for line in lines if line.kind == "begin"]
    assert begun == ["works", "first", "second", "dies", "first"]
    assert figures(written / "next" / NAME) == [7, 1, 2, 1, 1, 2]
    assert ended(lines) == {"works": 0, "second": 0, "dies": -6, "first": 0}
    assert "dies: exit code -6" in capsys.readouterr().out


def test_no_part_begins_without_time_for_it(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned(written, monkeypatch, "works")
    assert call.main(["--out", str(written / "late"), "--budget-seconds", "1"]) == 0
    assert "not run, 1 s are left: works" in capsys.readouterr().out
    assert not ended(list(read(written / "late" / NAME)))


@pytest.mark.slow
def test_the_script_killed_in_a_part_loses_no_earlier_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_call", "--rehearse", "--out", str(tmp_path)]
    command += ["--only", "machine", "ceilings"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not rows(list(read(tmp_path / NAME)), "ceilings"):
        assert time.monotonic() < deadline and script.poll() is None
        time.sleep(0.05)
    script.kill()
    script.wait()
    held = list(read(tmp_path / NAME))
    assert ended(held) == {"machine": 0}
    again = subprocess.run(command, env=environment, cwd=ROOT, timeout=250, capture_output=True)
    assert again.returncode == 0, again.stdout
    lines = list(read(tmp_path / NAME))
    assert [line.part for line in lines if line.kind == "begin"] == [
        "machine",
        "ceilings",
        "ceilings",
    ]
    assert lines[: len(held)] == held
    assert b"loss in parts of 1024" in again.stdout


def test_every_part_s_command_can_be_read_and_the_order_is_that_of_their_worth() -> None:
    for rehearse in (False, True):
        made = parts(rehearse, Path("build/bench/results.jsonl"))
        names = [part.name for part in made]
        assert len(set(names)) == len(names)
        order = [names.index(name) for name in ("machine", "agreement", "tests/gpu/test_engine.py")]
        order.append(next(n for n, name in enumerate(names) if name.startswith("hybrid")))
        assert order == sorted(order)
        from benchmarks.gpu_call.measure import parse_options

        for part in made:
            module, *arguments = part.command
            if module != "pytest":
                assert parse_options([*arguments, "--rows-fd", "3"]).rehearse == rehearse
    # What decides the headline fits into the first call of nine minutes even where every part
    # takes all of its limit but for the slowest.
    first = [part for part in parts(False, Path("x")) if part.name.startswith(("mach", "ceil"))]
    assert sum(part.limit_seconds for part in first) < 120


def test_earlier_rows_choose_kernels_and_blocks() -> None:
    setting = Setting.of(rehearse=True)
    kernel = {"kernel": "varlen", "layer": "windowed", "length": 64, "packed": False}
    setting.learn(
        [
            kernel | {"seconds": 2.0},
            kernel | {"kernel": "cudnn_frontend", "seconds": 1.0},
            kernel | {"kernel": "fa3", "seconds": 0.1, "packed": True},
            {"kernel": "flex", "layer": "windowed", "left_out": "no"},
            {"step": "hybrid", "length": 64, "blocks": "compiled", "tokens_per_second": 3.0},
            {"step": "hybrid", "length": 64, "blocks": "plain", "tokens_per_second": 4.0},
        ]
    )
    assert setting.kernels == {64: {"windowed": "cudnn_frontend"}}
    assert not setting.compiled
    config = setting.hybrid()
    assert setting.kernels_of_layers(config, 64) == 3 * ["cudnn_frontend"] + ["auto"]
    assert setting.kernels_of_layers(config, 4096) == 3 * ["cudnn_frontend"] + ["auto"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_steps_run_here_through_the_engine_and_a_peer_that_fails_is_a_line(tmp_path: Path) -> None:
    # With what a lent machine has and nothing else.
    python = str(make_python(tmp_path))
    command = [python, "-m", "benchmarks.gpu_call", "--rehearse", "--out", str(tmp_path)]
    command += ["--only", "attention blocked", "agreement", "hybrid 64 plain", "full 128", "packed"]
    command += ["8B", "peer sdpa+chunked"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, timeout=800, capture_output=True)
    lines = list(read(tmp_path / NAME))
    assert done.returncode == 0, done.stdout.decode() + json.dumps([x.detail for x in lines])
    found = rows(lines)
    assert any(row.get("agrees") for row in found)
    whole = {row["part"] for row in found if row.get("tokens_per_second", 0) > 0}
    assert whole == {"hybrid 64 plain", "full 128", "packed", "8B, moments off-loaded"} | {
        "peer sdpa+chunked"
    }
    assert next(row for row in found if row["part"] == "packed")["packed"]
    assert {row["micro_batches"] for row in found if "step" in row} == {2}
    nonsense = [python, "-m", "benchmarks.gpu_call.measure", "peer", "nonsense"]
    failed = subprocess.run(
        [*nonsense, "--lengths", "64", "--rehearse"],
        env=environment,
        cwd=ROOT,
        timeout=200,
        capture_output=True,
    )
    assert failed.returncode == 1
