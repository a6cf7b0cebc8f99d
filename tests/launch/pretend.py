"""A run without a model: steps that only sleep, the same heartbeats, ledger, checkpoints and exit
codes. What Slurm and the launcher do to it takes seconds instead of minutes.

    python tests/launch/pretend.py [FAULT …] RUN.yaml

Faults: fail@3 (rank 1 ends with code 7 before step 3 of every attempt), fail_once@3, code=2@3,
hang@3 (rank 1 does nothing at step 3, once).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from megahybrid.heartbeat import Heartbeat, write_stacks_on_signal

STEP_SECONDS = 0.25
# What every line of a ledger has besides what a test says of it.
LEDGER_LINE = {
    "attempt": 1, "stage": "long", "tokens": 0, "time_unix": 1.7e9, "length": 64,
    "source_tokens": {}, "cursor_crc": 0, "learning_rate": 0.0, "loss": None, "gradient_norm": None,
}  # fmt: skip
SAVE_SECONDS = float(os.environ.get("PRETEND_SAVE", "0.1"))


def main(words: list[str]) -> int:
    """The rank's life; what it does at each step is decided by files, which all ranks see."""
    *faults, run_file = words
    run = Path(run_file).parent.parent
    steps = int(os.environ.get("PRETEND_STEPS", "30"))
    rank = int(os.environ.get("RANK", os.environ["SLURM_PROCID"]))  # an agent's, or srun's
    stop = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: stop.append(True))
    heart = Heartbeat(run, rank, beat_seconds=0.3).start()
    write_stacks_on_signal(Path(os.environ["MEGAHYBRID_LOGS"]) / f"stacks-{rank:04d}.txt")
    saved = sorted((run / "checkpoints").glob("step-*"))
    step = int(saved[-1].name.removeprefix("step-")) if saved else 0
    print(f"rank {rank} of {_ranks()} begins at step {step}", flush=True)
    while step < steps:
        heart.phase("step", step)
        for fault in faults:
            code = _fault(fault, step, rank, run)
            if code is not None:
                print("Traceback (most recent call last):\n  pretend\nValueError: on purpose")
                heart.end(code, f"rank {rank}: ValueError: on purpose")
                return code
        time.sleep(STEP_SECONDS)
        asked = _agree(run, rank, step, bool(stop) or (run / "stop-now").exists())
        step += 1
        if rank == 0:
            _ledger(run, {"kind": "step", "step": step, "loss": 2 + 3 / step, "seconds": {}})
        if asked:
            return _leave(run, rank, step, heart)
        if step % 10 == 0 and rank == 0:
            _save(run, step)
    heart.end(0)
    return 0


def _ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", os.environ["SLURM_NTASKS"]))


def _agree(run: Path, rank: int, step: int, asked: bool) -> bool:
    """Waits for all ranks, as a step's collectives do; whether any was asked to stop."""
    job = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0")
    folder = run / "agree" / ".".join((*job, str(step)))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f".{rank}").write_text("stop" if asked else "")
    (folder / f".{rank}").rename(folder / str(rank))
    while len(found := list(folder.glob("[0-9]*"))) < _ranks():
        time.sleep(0.02)
    return any(path.read_text() for path in found)


def _fault(fault: str, step: int, rank: int, run: Path) -> int | None:
    kind, _, at = fault.partition("@")
    if step != int(at) or rank != 1:
        return None
    once = run / f"did-{kind}"
    if kind == "fail" or (kind == "fail_once" and not once.exists()):
        once.touch()
        return 7
    if kind.startswith("code="):
        return int(kind.removeprefix("code="))
    if kind == "hang" and not once.exists():
        once.touch()
        time.sleep(3600)
    return None


def _leave(run: Path, rank: int, step: int, heart: Heartbeat) -> int:
    heart.phase("save", step)
    if rank == 0:
        _save(run, step)
    heart.end(75)
    return 75


def _save(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text("{}")
    _ledger(
        run,
        {
            "kind": "event",
            "event": "save",
            "step": step,
            "detail": {"ok": True, "seconds": SAVE_SECONDS},
        },
    )


def _ledger(run: Path, line: dict) -> None:
    with open(run / "ledger.jsonl", "a") as file:
        file.write(json.dumps(LEDGER_LINE | line) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
