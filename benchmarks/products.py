"""Matrix products on one core of a CPU: fp32 by torch's own routine and by oneDNN, and in bf16.

A run chooses between the first two for itself (`kernels.products: auto`). The third says what
`precision: bf16` has to gain: much with AMX, nothing on processors without bf16 instructions.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import in_turns
from megahybrid.parallel import matmul

# Rows, inputs and outputs: gate and up of the 25M shape over 2,048 tokens, and a square one.
SIZES = ((2048, 384, 3072), (2048, 2048, 2048))
WAYS = ("onednn", "torch", "bf16")


def measure(repeats: int = 15) -> list[dict[str, Any]]:
    """GFLOP/s by this process's CPU-seconds, the median of turns."""
    rows = []
    for size in SIZES:
        x, weight = torch.randn(size[0], size[1]), torch.randn(size[2], size[1])
        steps = [_product(way, x, weight) for way in WAYS]
        times = in_turns(steps, torch.device("cpu"), repeats, warm_up=2)
        flops = 2 * size[0] * size[1] * size[2] / 1e9
        row: dict[str, Any] = {"size": list(size)}
        row |= {way: value.as_json() for way, value in zip(WAYS, times, strict=True)}
        rows.append(row | {f"{way}_gflops": flops / row[way]["cpu_median"] for way in WAYS})
    return rows


def _product(way: str, x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    if way == "bf16":
        low, low_weight = x.bfloat16(), weight.bfloat16()
        return lambda: F.linear(low, low_weight)

    def run() -> Tensor:
        matmul.use(way)
        return matmul.linear(x, weight)

    return run


def table(rows: list[dict[str, Any]]) -> str:
    """What people read."""
    lines = [
        "| product | fp32 oneDNN GFLOP/s | fp32 torch GFLOP/s | bf16 GFLOP/s | oneDNN over torch |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = row["onednn_gflops"] / row["torch_gflops"]
        size = " × ".join(map(str, row["size"]))
        rates = " | ".join(f"{row[f'{way}_gflops']:.0f}" for way in WAYS)
        lines.append(f"| {size} | {rates} | {ratio:.2f} × |")
    return "\n".join(lines)
