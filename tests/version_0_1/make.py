"""What wrote the files beside it, with version 0.1.0 of this project: do not run it again.

python -m tests.version_0_1.make FOLDER
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from megahybrid.data.token_writer import TokenWriter
from megahybrid.launch.records import record
from tests.launch.test_script import _job
from tests.train.example import RUN, TOKENIZER, write_data

ROOT = Path(__file__).parents[2]
KEPT = 6  # steps of 16: inside of the second stage
SMALLER = (
    ("hidden_size: 32", "hidden_size: 16"),
    ("intermediate_size: 64", "intermediate_size: 32"),
    (
        "global: {position: {kind: nope}}",
        "global: {position: {kind: nope}, logit_scale: {kind: ssmax}}",
    ),
)


def main(folder: Path) -> None:
    """Data with a mask and a plan, a run that stopped within its second stage and how it went on,
    its export with our own class, and the folder of a job."""
    folder.mkdir(parents=True)
    write_data(folder)
    draw = np.random.default_rng(7)
    with TokenWriter(folder / "chats", TOKENIZER) as writer:
        for length in draw.integers(8, 60, 30):
            tokens = draw.integers(2, 97, length)
            writer.add(tokens, counts=np.arange(length) >= length // 2)
    megahybrid(folder, "data", "pack", "books", "--length", "256", "--output", "packed")
    text = RUN
    for old, new in SMALLER:
        assert old in text
        text = text.replace(old, new)
    (folder / "run.yaml").write_text(text)
    megahybrid(folder, "train", "run.yaml", "directory=run", "--processes", "1")
    megahybrid(folder, "export", "run", "export", "--architecture", "Megahybrid")
    np.save(folder / "logits.npy", logits_of(folder / "export"))
    cut_back(folder / "run", folder / "expected.jsonl")
    write_job(folder / "job")


def logits_of(export: Path) -> NDArray[np.float32]:
    """What transformers makes of the export, of 40 tokens."""
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
    with torch.no_grad():
        found: NDArray[np.float32] = model(torch.arange(2, 42)[None]).logits[0].numpy()
    return found


def cut_back(run: Path, rest: Path) -> None:
    """As a stop after KEPT steps would have left the run; the steps behind it go to `rest`."""
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) != KEPT:
            shutil.rmtree(path)
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    behind = [line for line in lines if line["kind"] == "step" and line["step"] > KEPT]
    rest.write_text("".join(json.dumps(line) + "\n" for line in behind))
    first = lines.index(behind[0])
    held = [line for line in lines[:first] if line.get("event") != "end"]
    (run / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in held))
    for name in ("logs", "programs", "report", "heartbeats"):
        shutil.rmtree(run / name, ignore_errors=True)
    (run / ".owner.lock.guard").unlink(missing_ok=True)


def write_job(folder: Path) -> None:
    """A job that was submitted and whose first attempt was preempted."""
    (folder / "slurm").mkdir(parents=True)
    (folder / "slurm" / "job.json").write_text(_job().model_dump_json(indent=2) + "\n")
    record(folder, "submit", jobs=["17"], nodes=4, spares=1, chain=1, site="big", commit="0" * 12)
    record(folder, "start", job="17", attempt=0, nodes=["n1", "n2"], checkpoint=None)
    record(folder, "end", job="17", attempt=0, code=75, step=4, checkpoint=4, reason="preempted")


def megahybrid(folder: Path, *words: str) -> None:
    """A command of this tree, in `folder`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megahybrid", *words]
    subprocess.run(command, cwd=folder, env=environment, check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
