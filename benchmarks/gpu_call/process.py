"""Running one part: a process group with a deadline, whose figures arrive through a pipe."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_call.results import Results

ROOT = Path(__file__).parents[2]
KILLED = -signal.SIGKILL
TAIL_BYTES = 4000


def run_part(
    name: str,
    command: Sequence[str],
    limit_seconds: float,
    results: Results,
    log: Path,
    rows: bool,
) -> int:
    """Run `command` (a Python module and its arguments) and return its exit code.

    With `rows` the process is told a descriptor (`--rows-fd`) and every line of JSON that it
    writes there is kept at once. Past `limit_seconds` its whole group is killed. What it printed
    goes to `log`, its last lines into the part's last line.
    """
    results.add(name, "begin", limit_seconds=limit_seconds, command=list(command))
    started, began_at = time.monotonic(), log.stat().st_size if log.exists() else 0
    receive, send = os.pipe()
    told = ["--rows-fd", str(send)] if rows else []
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", *command, *told],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(send,) if rows else (),
            start_new_session=True,
        )
    os.close(send)
    in_time = _keep_rows(name, receive, process, started + limit_seconds, results)
    os.close(receive)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # and whatever it left running
    code = process.wait()
    seconds = time.monotonic() - started
    what = {} if in_time else {"over": f"its {limit_seconds:.0f} s"}
    results.add(name, "end", rc=code, seconds=round(seconds, 2), tail=tail(log, began_at), **what)
    return code


def _keep_rows(
    name: str, receive: int, process: subprocess.Popen, deadline: float, results: Results
) -> bool:
    """Keep what comes until the process ends or the deadline comes; whether it ended in time."""
    pending, open_ended = b"", True
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        if open_ended:
            ready, _, _ = select.select([receive], [], [], min(left, 0.2))
            if ready:
                came = os.read(receive, 1 << 16)
                open_ended = bool(came)
                *whole, pending = (pending + came).split(b"\n")
                for line in whole:
                    results.add(name, "row", **json.loads(line))
                continue
        else:
            time.sleep(min(left, 0.05))
        if process.poll() is not None and not (open_ended and _readable(receive)):
            return True


def _readable(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0)[0])


def tail(log: Path, began_at: int) -> str:
    """Return the last lines that a part printed."""
    with open(log, "rb") as printed:
        size = printed.seek(0, os.SEEK_END)
        printed.seek(max(began_at, size - TAIL_BYTES))
        lines = printed.read().decode(errors="replace").strip().splitlines()
    return "\n".join(lines[-6:])[-1200:]
