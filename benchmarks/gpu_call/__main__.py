"""The script of a call: runs the parts, keeps their lines, prints a short table last."""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu_call.parts import Part, parts
from benchmarks.gpu_call.process import run_part
from benchmarks.gpu_call.results import NAME, Results, ended, lost, read
from benchmarks.gpu_call.table import table

CLOCKS = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw,memory.used"]


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 where a part failed, after all of them and the table."""
    options = parse_options(arguments)
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    results = Results(out / NAME)
    if options.after is not None:
        results.take_over(options.after)
    found = list(read(results.path))
    planned = [part for part in parts(options.rehearse, results.path) if wanted(part, options)]
    over = {} if options.again else ended(found)
    planned = [part for part in planned if part.name not in over]
    # What was under way when a call ended may have ended it: it comes last.
    suspects = lost(found)
    planned.sort(key=lambda part: part.name in suspects)
    run_all(planned, results, out / "log.txt", time.monotonic() + options.budget_seconds)
    lines = list(read(results.path))
    print(table(lines), flush=True)
    print(f"all figures: {results.path}", flush=True)
    return int(any(code for code in ended(lines).values()))


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_call",
        description="Every measurement on one GPU, each part in a process of its own.",
    )
    parser.add_argument("--rehearse", action="store_true", help="all of it on a CPU, tiny")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts that begin with these")
    parser.add_argument("--again", action="store_true", help="also parts that have ended before")
    parser.add_argument("--after", type=Path, help="results of an earlier call, to go on behind")
    parser.add_argument(
        "--budget-seconds", type=float, default=540.0, help="when to stop (540: a ten-minute call)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or "build/bench"),
        help="folder of results.jsonl, log.txt and profile.txt ($OUT, else build/bench)",
    )
    return parser.parse_args(arguments)


def wanted(part: Part, options: argparse.Namespace) -> bool:
    """Whether the command line asks for this part."""
    return options.only is None or part.name.startswith(tuple(options.only))


def run_all(planned: list[Part], results: Results, log: Path, deadline: float) -> None:
    """Run the parts for which time is left; a part gets no more than that."""
    clocks(results)
    for part in planned:
        left = deadline - time.monotonic()
        if left < min(20.0, part.limit_seconds):
            print(f"  not run, {left:.0f} s are left: {part.name}", flush=True)
            continue
        began = time.monotonic()
        code = run_part(
            part.name, part.command, min(part.limit_seconds, left), results, log, part.rows
        )
        said = "" if code == 0 else f"  exit code {code}: see {log}"
        print(f"  [{time.monotonic() - began:5.1f} s] {part.name}{said}", flush=True)
        clocks(results)


def clocks(results: Results) -> None:
    """A line of the card's clocks, temperature and power, where it has a tool that tells."""
    if shutil.which(CLOCKS[0]) is None:
        return
    try:
        told = subprocess.run(
            [*CLOCKS, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except subprocess.TimeoutExpired:
        return
    results.add("clocks", "clocks", read=told.stdout.strip())


if __name__ == "__main__":
    sys.exit(main())
