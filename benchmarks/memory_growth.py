"""Peak resident memory of a process against the formulas of config/memory.py, on a CPU.

Each figure is the growth of a fresh process from before a forward and backward to its peak; what
is compared is the difference of two such processes, so that what both hold falls out.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import hybrid, random_batch
from benchmarks.steps import our_loss, our_model
from megahybrid.config.memory_estimate import activations, working

SHAPE, TOKENS = "25m", 4096
POLICIES = ("none", "selective", "chunked", "full")
LOSS_TOKENS, LOSS_VOCAB, LOSS_HIDDEN = 4096, 65536, 64


def measure() -> dict[str, Any]:
    """Bytes by case, and what the formulas say of the differences."""
    grown = {case: _growth_of(case) for case in (*POLICIES, "loss-chunked", "loss-plain")}
    config = hybrid(SHAPE)
    foretold = {}
    for policy in POLICIES:
        batch = ([policy] * config.layer_plan.num_layers, TOKENS, 1, "fp32", "cpu")
        foretold[policy] = activations(config, *batch) + working(config, *batch)
    return {
        "shape": SHAPE,
        "tokens": TOKENS,
        "grown": grown,
        "by_formula": foretold,
        "logits_bytes": 4 * LOSS_TOKENS * LOSS_VOCAB,
        "loss_shape": [LOSS_TOKENS, LOSS_VOCAB],
    }


def _growth_of(case: str) -> int:
    """Bytes by which `case` raises the peak of a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory_growth", case]
    # Every tensor a mapping of its own, returned when freed: the peak is that of live tensors.
    exact = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=1200, env=os.environ | exact
    )
    return int(done.stdout)


def grow(case: str) -> int:
    """Runs `case` in this process; bytes from before it to the peak."""
    torch.set_num_threads(1)
    run = _loss(case) if case.startswith("loss") else _model(case)
    # A process inherits its parent's peak; this makes the peak what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    run()
    return _peak() - before


def _model(policy: str) -> Any:
    config, device = hybrid(SHAPE), torch.device("cpu")
    policies = [policy] * config.layer_plan.num_layers
    model = our_model(config, device, torch.float32, policies)
    tokens, targets = random_batch(config, 1, TOKENS, device)
    # A short one first, for what libraries allocate once; gradients exist from then on.
    our_loss(model, tokens[:, :256], targets[:, :256]).backward()
    return lambda: our_loss(model, tokens, targets).backward()


def _loss(case: str) -> Any:
    import torch.nn.functional as F

    from megahybrid.parallel.mesh import ParallelMesh
    from megahybrid.parallel.vocab import VocabParallelHead

    head = VocabParallelHead(LOSS_VOCAB, LOSS_HIDDEN, "head.weight", ParallelMesh.single())
    hidden = torch.randn(LOSS_TOKENS, 1, LOSS_HIDDEN, requires_grad=True)
    targets = torch.randint(0, LOSS_VOCAB, (1, LOSS_TOKENS))
    head(hidden[:8], targets[:, :8])[0].backward()
    if case == "loss-chunked":
        return lambda: head(hidden, targets)[0].backward()
    weight = head.weight
    return lambda: F.cross_entropy(F.linear(hidden, weight).squeeze(1), targets[0]).backward()


def _peak() -> int:
    """Linux's high-water mark of resident memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def table(result: dict[str, Any]) -> str:
    """Differences of peaks beside the formulas' differences."""
    grown, foretold = result["grown"], result["by_formula"]
    lines = [
        f"| {result['shape']}, fp32, {result['tokens']} tokens | peak grows by | by formula "
        "| measured / formula |",
        "|---|---|---|---|",
    ]
    for policy in POLICIES:
        lines.append(
            f"| recompute {policy} | {_mib(grown[policy])} | {_mib(foretold[policy])} "
            f"| {grown[policy] / foretold[policy]:.2f} |"
        )
    tokens, vocab = result["loss_shape"]
    logits = result["logits_bytes"]
    lines += [
        f"| loss of {tokens} tokens, {vocab} words: plain | {_mib(grown['loss-plain'])} "
        f"| | {grown['loss-plain'] / logits:.2f} × the logits |",
        f"| the same in chunks | {_mib(grown['loss-chunked'])} "
        f"| | {grown['loss-chunked'] / logits:.2f} × the logits |",
    ]
    return "\n".join(lines)


def _mib(count: float) -> str:
    return f"{count / 2**20:.0f} MiB"


if __name__ == "__main__":
    print(grow(sys.argv[1]))
