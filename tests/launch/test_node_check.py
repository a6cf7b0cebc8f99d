"""What makes a node unfit, and how it is told."""

import json
import time
from pathlib import Path

import pytest

from megahybrid.launch.node_check import clock, disk, folder, judge_gpus, main, memory, own

HEALTHY = "".join(f"{index}, 4, 0\n" for index in range(8))


def test_eight_idle_gpus_without_errors_are_fit() -> None:
    assert judge_gpus(HEALTHY, 8, 1000) == []
    assert judge_gpus("0, 4, [N/A]\n", 1, 1000) == []


@pytest.mark.parametrize(
    ("csv", "problem"),
    [
        (HEALTHY.replace("7, 4, 0\n", ""), "7 GPUs (8 wanted)"),
        (HEALTHY.replace("3, 4, 0", "3, 70000, 0"), "GPU 3 is in use (70000 MiB)"),
        (HEALTHY.replace("5, 4, 0", "5, 4, 2"), "GPU 5 has 2 uncorrected ECC errors"),
    ],
)
def test_a_gpu_that_is_not_fit_is_named(csv: str, problem: str) -> None:
    assert judge_gpus(csv, 8, 1000) == [problem]


def test_clock_room_memory_and_folder(tmp_path: Path) -> None:
    assert clock(100.0, 110.0, 30) == []
    assert clock(100.0, 40.0, 30) == ["clock is off by -60 s"]
    assert disk(tmp_path, 0) == []
    assert "GiB free (1e+09 wanted)" in disk(tmp_path, 1e9)[0]
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 524288 kB\n")
    assert memory(tmp_path / "meminfo", 0.4) == []
    assert memory(tmp_path / "meminfo", 1) == ["0.5 GiB of memory available (1 wanted)"]
    assert folder(tmp_path) == []
    assert folder(tmp_path / "absent") == [
        f"{tmp_path / 'absent'} cannot be written to (No such file or directory)"
    ]


def test_the_sites_own_check_is_heard() -> None:
    assert own("true") == []
    assert own("echo first; echo the fan stands still; exit 3") == [
        "site's check: the fan stands still"
    ]


def test_a_node_writes_what_is_wrong_with_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    options = [f"--output={tmp_path / 'nodes'}", f"--run-directory={tmp_path}"]
    assert main([*options, f"--now={time.time()}", "--command=echo ill; false"]) == 0
    found = json.loads((tmp_path / "nodes" / "n7.json").read_text())
    assert found == {"node": "n7", "problems": ["site's check: ill"]}
