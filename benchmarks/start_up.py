"""From the command to the first step, beyond importing torch; and what a step costs besides itself.

    python -m benchmarks.start_up [--steps 40]

`megahybrid train` runs as a user runs it, on a model so small that its steps are nearly nothing.
Wall-clock and CPU-seconds (of the process and its threads) until the first line of a step is in the
ledger, less those of `python -c "import torch"`. `other` is a step's time outside of data, forward,
backward and update: ledger, console, telemetry and the loop itself.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import heading, machine, write
from megahybrid.data.manifest import TokenizerInfo
from megahybrid.data.token_writer import TokenWriter

GOAL_SECONDS, GOAL_SHARE = 6.0, 0.01
STEP_OF_1B_SECONDS = 0.6  # 32k tokens on one H200 at the goal of 56k tokens a second
RUN = """
precision: fp32
device: cpu
directory: {folder}/run
model:
  vocab_size: 97
  hidden_size: 32
  intermediate_size: 64
  num_heads: 4
  num_kv_heads: 2
  layer_plan:
    num_layers: 2
    pattern: [local, global]
    schemes:
      local: {{position: {{kind: rope, theta: 10000}}, window: 16}}
      global: {{position: {{kind: nope}}}}
data: {{sources: {{text: {{path: {folder}/text}}}}, block_tokens: 512, lanes: 4}}
stages:
  - name: only
    tokens: {tokens}
    lengths: {{64: 1}}
    batch_tokens: 512
    micro_batch_tokens: 512
    weights: {{text: 1}}
    learning_rate: {{kind: linear, start: 1.0e-3, end: 1.0e-4}}
"""


def main(arguments: list[str] | None = None) -> int:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    facts = machine(torch.device("cpu"))
    print(heading(facts))
    rounds = [measure(options.steps) for _ in range(options.rounds)]
    result = {"machine": facts, "rounds": rounds}
    print(table(rounds))
    print(f"all figures: {write('start_up_cpu', result)}")
    return 0


def measure(steps: int) -> dict[str, Any]:
    """One run, beside one import of torch."""
    wall, cpu = _import_torch()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = TokenizerInfo(kind="sentencepiece", sha256="0" * 64, vocab_size=97, eod_id=1)
        draw = np.random.default_rng(0)
        with TokenWriter(folder / "text", tokenizer) as writer:
            for length in draw.integers(50, 700, 40):
                writer.add(draw.integers(2, 97, length))
        (folder / "run.yaml").write_text(RUN.format(folder=folder, tokens=512 * steps))
        command = [sys.executable, "-m", "megahybrid", "train", str(folder / "run.yaml")]
        began = time.perf_counter()
        ledger = folder / "run" / "ledger.jsonl"
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while not _steps(ledger):
                if process.poll() is not None:
                    raise RuntimeError("the run ended before its first step")
                time.sleep(0.01)
            first = time.perf_counter() - began
            first_cpu = _cpu_seconds(process.pid)
        lines = _steps(ledger)
    # The first step is audited and the last one saves.
    other = [line["seconds"]["other"] for line in lines[2:-1]]
    return {
        "torch_wall": wall,
        "torch_cpu": cpu,
        "first_step_wall": first,
        "first_step_cpu": first_cpu,
        "other_seconds": other,
    }


def _steps(ledger: Path) -> list[dict[str, Any]]:
    """The lines of steps that are whole."""
    if not ledger.exists():
        return []
    text = ledger.read_text()
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [line for line in lines if line["kind"] == "step"]


def _import_torch() -> tuple[float, float]:
    """Wall-clock and CPU-seconds of a process that does nothing else."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _cpu_seconds(pid: int) -> float:
    """Of a living process with its threads and the children it has waited for (proc(5), stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def table(rounds: list[dict[str, Any]]) -> str:
    """Medians over the rounds."""

    def middle(name: str) -> float:
        return statistics.median(one[name] for one in rounds)

    other = statistics.median(value for one in rounds for value in one["other_seconds"])
    beyond = middle("first_step_wall") - middle("torch_wall")
    beyond_cpu = middle("first_step_cpu") - middle("torch_cpu")
    return "\n".join(
        [
            "| | wall s | CPU-s |",
            "|---|---|---|",
            f"| import torch | {middle('torch_wall'):.2f} | {middle('torch_cpu'):.2f} |",
            f"| megahybrid train, to the first step | {middle('first_step_wall'):.2f} "
            f"| {middle('first_step_cpu'):.2f} |",
            f"| beyond torch (goal {GOAL_SECONDS:.0f}) | {beyond:.2f} | {beyond_cpu:.2f} |",
            f"| beside a step's own work | {other * 1e3:.2f} ms, "
            f"{other / STEP_OF_1B_SECONDS:.2%} of a 1B step of {STEP_OF_1B_SECONDS} s "
            f"(goal {GOAL_SHARE:.0%}) | |",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
