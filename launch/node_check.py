"""The check of one node: a task per node writes NODE.json with its problems before ranks start.

python -m megahybrid.launch.node_check --output DIR --run-directory RUN --gpus 8 …
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from megahybrid.heartbeat import write_whole

GIB = 2**30


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the problems of this node; returns 0 whether or not there are any."""
    parser = argparse.ArgumentParser(
        prog="megahybrid.launch.node_check", description="Is this node fit?"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--run-directory", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--free-disk-gib", type=float, default=0)
    parser.add_argument("--free-memory-gib", type=float, default=0)
    parser.add_argument("--idle-gpu-mib", type=int, default=1000)
    parser.add_argument("--clock-skew-seconds", type=float, default=30)
    parser.add_argument("--command", help="the site's own check, a shell line")
    parser.add_argument("--now", type=float, required=True, help="the batch host's time")
    wanted = parser.parse_args(arguments)
    problems = [
        *clock(wanted.now, time.time(), wanted.clock_skew_seconds),
        *disk(Path(tempfile.gettempdir()), wanted.free_disk_gib),
        *memory(Path("/proc/meminfo"), wanted.free_memory_gib),
        *folder(wanted.run_directory),
    ]
    if wanted.gpus:
        problems += gpus(wanted.gpus, wanted.idle_gpu_mib)
    if wanted.command:
        problems += own(wanted.command)
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    wanted.output.mkdir(parents=True, exist_ok=True)
    write_whole(wanted.output / f"{node}.json", json.dumps({"node": node, "problems": problems}))
    return 0


def clock(expected: float, found: float, limit: float) -> list[str]:
    """Return a problem where the clock is off.

    It is compared with the batch host's when it started the check (that takes some seconds).
    """
    skew = found - expected
    return [f"clock is off by {skew:+.0f} s"] if abs(skew) > limit else []


def disk(path: Path, least_gib: float) -> list[str]:
    """Return problems with the room and inodes of the node's temporary folder."""
    free = shutil.disk_usage(path).free / GIB
    inodes = os.statvfs(path)
    problems = []
    if free < least_gib:
        problems.append(f"{path} has {free:.1f} GiB free ({least_gib:g} wanted)")
    if inodes.f_files and inodes.f_favail < 1000:
        problems.append(f"{path} has {inodes.f_favail} inodes left")
    return problems


def memory(meminfo: Path, least_gib: float) -> list[str]:
    """Return a problem where programs can have too little memory."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return []
    kib = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    if kib is None or kib / 2**20 >= least_gib:
        return []
    return [f"{kib / 2**20:.1f} GiB of memory available ({least_gib:g} wanted)"]


def folder(run_directory: Path) -> list[str]:
    """Return a problem where the run's folder cannot be written to from here."""
    probe = run_directory / f".probe-{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
    try:
        probe.write_text("x")
        read = probe.read_text()
        probe.unlink()
    except OSError as error:
        return [f"{run_directory} cannot be written to ({error.strerror})"]
    return [] if read == "x" else [f"{run_directory} does not return what was written to it"]


def own(command: str) -> list[str]:
    """Return the problem that the site's own check found: the last line that it printed."""
    try:
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"site's check: {error}"]
    said = (done.stdout + done.stderr).strip().splitlines()[-1:]
    return (
        [f"site's check: {' '.join(said) or f'code {done.returncode}'}"] if done.returncode else []
    )


def gpus(wanted: int, idle_mib: int) -> list[str]:
    """Return problems with GPUs.

    They are their number, other users, uncorrected ECC errors and Xid messages.
    """
    query = "index,memory.used,ecc.errors.uncorrected.volatile.total"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"nvidia-smi: {error}"]
    if done.returncode:
        return [f"nvidia-smi: {(done.stderr or done.stdout).strip().splitlines()[-1:]}"]
    return [*judge_gpus(done.stdout, wanted, idle_mib), *xid()]


def judge_gpus(csv: str, wanted: int, idle_mib: int) -> list[str]:
    """Return the problems in nvidia-smi's lines `index, MiB used, uncorrected errors`."""
    rows = [[cell.strip() for cell in line.split(",")] for line in csv.splitlines() if line.strip()]
    problems = [] if len(rows) >= wanted else [f"{len(rows)} GPUs ({wanted} wanted)"]
    for index, used, errors in rows:
        if used.isdigit() and int(used) > idle_mib:
            problems.append(f"GPU {index} is in use ({used} MiB)")
        if errors.isdigit() and int(errors):
            problems.append(f"GPU {index} has {errors} uncorrected ECC errors")
    return problems


def xid() -> list[str]:
    """Return NVIDIA's messages of hardware trouble in the kernel's log, where it may be read."""
    try:
        done = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = [line for line in done.stdout.splitlines() if "NVRM: Xid" in line]
    return [f"kernel log: {found[-1].strip()}"] if found else []


if __name__ == "__main__":
    sys.exit(main())
