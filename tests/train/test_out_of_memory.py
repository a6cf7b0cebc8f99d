"""Memory that ran out is told in one line: what was measured, what was planned, what to change."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megahybrid.config import load
from megahybrid.train.out_of_memory import explain_out_of_memory, is_out_of_memory

ROOT = Path(__file__).parents[2]


def test_the_message_names_the_stage_that_needs_most_and_its_fields() -> None:
    run = load(ROOT / "configs/runs/paper_rnope_swa_8b.yaml")
    message = explain_out_of_memory(run, 3, 64)
    assert "\n" not in message
    assert message.startswith("rank 3: out of memory at a peak of ")
    assert " GiB by plan (weights 3.7, gradients 7.5, optimizer 1.4, activations " in message
    assert "Lower stages.1.micro_batch_tokens=65536, set stages.1.recompute: full" in message


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried …"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_errors_that_mean_no_memory_are_known(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


def test_torchs_own_words_are_still_those() -> None:
    """In a process of its own, with little address space."""
    code = (
        "import resource, torch\n"
        "from megahybrid.train.out_of_memory import is_out_of_memory\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 34, 1 << 34))\n"
        "try:\n    torch.empty(1 << 35)\n"
        "except Exception as error:\n    print(is_out_of_memory(error))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.stdout.strip() == "True", done.stderr
