"""A run under a random fault every so often: how much was useful, and what a recovery takes.

    python -m benchmarks.soak [--minutes 10] [--every 20] [--seed 1]

Two ranks train tests/train/example.py's model, made longer. Faults, in shuffled rounds so that each
has its turn: a rank is killed, a rank is stopped (the launcher's watchdog finds it; it starts both
again), the launcher is killed, the run is asked to stop (both: the same command again). Afterwards
the losses are compared with those of the same run left alone, bit for bit. Prints JSON.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megahybrid.heartbeat import read_beats
from megahybrid.ledger import LEDGER_NAME, StepLine, read_every_line, read_ledger
from tests.train.example import write_example

ROOT = Path(__file__).parents[1]
KINDS = ("a rank is killed", "a rank hangs", "the launcher is killed", "asked to stop")
OUTPUT = "output.txt"  # of all launchers
# As `train --max-restarts` does, less patient with a rank that gives no sign.
LAUNCHER = """
import sys
from pathlib import Path
from megahybrid.config.site import Watchdog
from megahybrid.commands.local_restarts import train_local
name, *words = sys.argv[1:]
command = ["-m", "megahybrid", "train", "run.yaml", f"directory={name}", *words]
sys.exit(train_local(command, 2, Path(name), 1000, Watchdog(silent=10)))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between faults")
    parser.add_argument("--pause", type=float, default=0.1, help="seconds added to each step")
    parser.add_argument("--save-every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="megahybrid-soak-"))
    try:
        run_file = write_example(folder)
        text = run_file.read_text().replace("tokens: 6144", "tokens: 61440000", 1)
        run_file.write_text(text.replace("every_steps: 5, max", "every_steps: 500, max"))
        print(json.dumps(soak(folder, asked), indent=2))
    finally:
        shutil.rmtree(folder)


def soak(folder: Path, asked: argparse.Namespace) -> dict:
    """The whole of it."""
    draw = random.Random(asked.seed)
    run = folder / "run"
    recoveries: dict[str, list[float]] = {kind: [] for kind in KINDS}
    end = time.monotonic() + 60 * asked.minutes
    process = _start(folder, "run", asked)
    _step_after(run, 0, process)
    kinds: list[str] = []
    while time.monotonic() < end:
        time.sleep(draw.uniform(0.5, 1.5) * asked.every)
        kinds = kinds or draw.sample(KINDS, len(KINDS))
        kind = kinds.pop()
        began, attempt = time.monotonic(), _attempt(run)
        process = _fault(kind, process, draw, run, folder, asked)
        _step_after(run, attempt, process)
        recoveries[kind].append(time.monotonic() - began)
    process.send_signal(signal.SIGTERM)
    process.wait(120)
    held = read_ledger(run / LEDGER_NAME).steps
    executed = _steps(run)
    undisturbed = _undisturbed(folder, held[-1].step, asked)
    return {
        "minutes": asked.minutes,
        "faults": sum(map(len, recoveries.values())),
        "seconds from fault to next step": {
            kind: {
                "times": len(times),
                "median": round(statistics.median(times), 1),
                "longest": round(max(times), 1),
            }
            for kind, times in recoveries.items()
            if times
        },
        "hangs that the watchdog named": (folder / OUTPUT).read_text().count("hang: rank"),
        "steps that hold": len(held),
        "steps executed": executed,
        "useful": round(len(held) / executed, 4),
        "losses that differ from the undisturbed run": sum(
            (one.step, one.loss, one.gradient_norm) != (other.step, other.loss, other.gradient_norm)
            for one, other in zip(held, undisturbed, strict=True)
        ),
    }


def _start(folder: Path, name: str, asked: argparse.Namespace, *more: str) -> subprocess.Popen:
    # The launcher starts ranks by `-m megahybrid`; sitecustomize makes each of their steps slower.
    slow = folder / "slow"
    slow.mkdir(exist_ok=True)
    (slow / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'RANK' in os.environ:\n"
        "    import megahybrid.train.trainer as trainer, time\n"
        "    advance = trainer.Trainer._advance\n"
        f"    pause = lambda *a: (time.sleep({asked.pause}), advance(*a))[1]\n"
        "    trainer.Trainer._advance = pause\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{slow}:{ROOT}"}
    command = [sys.executable, "-c", LAUNCHER, name, "parallel.tensor=2"]
    command += [f"checkpoint.every_steps={asked.save_every}", *more]
    with open(folder / OUTPUT, "a") as output:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)


def _fault(
    kind: str,
    process: subprocess.Popen,
    draw: random.Random,
    run: Path,
    folder: Path,
    asked: argparse.Namespace,
) -> subprocess.Popen:
    """Does it; returns the process that goes on."""
    if kind in ("a rank is killed", "a rank hangs"):
        beats = read_beats(run).values()
        beat = draw.choice([beat for beat in beats if Path(f"/proc/{beat.pid}").exists()])
        os.kill(beat.pid, signal.SIGKILL if kind == "a rank is killed" else signal.SIGSTOP)
        return process
    process.send_signal(signal.SIGTERM if kind == "asked to stop" else signal.SIGKILL)
    process.wait(120)
    return _start(folder, "run", asked)


def _steps(run: Path) -> int:
    """Step lines of all attempts."""
    path = run / LEDGER_NAME
    if not path.exists():
        return 0
    return sum(isinstance(line, StepLine) for line in read_every_line(path))


def _attempt(run: Path) -> int:
    """Of the newest step line; 0 before there is one."""
    lines = read_every_line(run / LEDGER_NAME) if (run / LEDGER_NAME).exists() else []
    return max((line.attempt for line in lines if isinstance(line, StepLine)), default=0)


def _step_after(run: Path, attempt: int, process: subprocess.Popen) -> None:
    """Until a later attempt has made a step: ranks that the fault met may still write one."""
    deadline = time.monotonic() + 300
    while _attempt(run) <= attempt:
        assert process.poll() is None, f"the run ended with {process.returncode}"
        assert time.monotonic() < deadline, "no step in five minutes"
        time.sleep(0.1)


def _undisturbed(folder: Path, steps: int, asked: argparse.Namespace) -> list[StepLine]:
    """As many steps, in one go."""
    run = folder / "undisturbed"
    quick = argparse.Namespace(**{**vars(asked), "pause": 0, "save_every": 10**6})
    process = _start(folder, "undisturbed", quick, "evaluate.every_steps=null")
    while _steps(run) < steps:
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.wait(120)
    return read_ledger(run / LEDGER_NAME).steps[:steps]


if __name__ == "__main__":
    main()
