"""Config is light: no torch, and a check under a second."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, sys, time
started = time.process_time()
from megahybrid.config import check_run, load
run = load("configs/runs/demo.yaml", ["parallel.tensor=1"])
loaded = time.process_time()
check_run(run, 1)
from megahybrid.config.summary import summary
summary(run, 1)
checked = time.process_time()
from megahybrid.config.describe import describe, render
from megahybrid.interop.architectures.table import huggingface_fits
assert "Cohere2" in render(describe(run, None, huggingface_fits))
heavy = [m for m in ("torch", "numpy", "deepspeed", "transformers", "wandb") if m in sys.modules]
print(json.dumps({"load": loaded - started, "check": checked - started, "heavy": heavy}))
"""


def test_loading_and_checking_is_quick_and_imports_nothing_heavy() -> None:
    found = json.loads(
        subprocess.run(
            [sys.executable, "-c", SCRIPT], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
    )
    assert found["heavy"] == []
    assert found["load"] < 0.6
    assert found["check"] < 1
