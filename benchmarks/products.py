"""fp32 matrix products on one core of a CPU: ours (oneDNN where it serves) against torch's own."""

from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.timing import in_turns
from megahybrid.parallel.products import linear

# Rows, inputs and outputs: gate and up of the 25M shape over 2,048 tokens, and a square one.
SIZES = ((2048, 384, 3072), (2048, 2048, 2048))


def measure(repeats: int = 15) -> list[dict[str, Any]]:
    """GFLOP/s by this process's CPU-seconds, the median of turns."""
    device, rows = torch.device("cpu"), []
    for size in SIZES:
        x, weight = torch.randn(size[0], size[1]), torch.randn(size[2], size[1])
        steps = [lambda x=x, w=weight: linear(x, w), lambda x=x, w=weight: F.linear(x, w)]
        ours, theirs = in_turns(steps, device, repeats, warm_up=2)
        flops = 2 * size[0] * size[1] * size[2] / 1e9
        row: dict[str, Any] = {
            "size": list(size),
            "ours": ours.as_json(),
            "torch": theirs.as_json(),
        }
        row |= {f"{who}_gflops": flops / row[who]["cpu_median"] for who in ("ours", "torch")}
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """What people read."""
    lines = ["| fp32 product | ours GFLOP/s | torch GFLOP/s | ours is |", "|---|---|---|---|"]
    for row in rows:
        ratio = row["ours_gflops"] / row["torch_gflops"]
        size = " × ".join(map(str, row["size"]))
        lines.append(
            f"| {size} | {row['ours_gflops']:.0f} | {row['torch_gflops']:.0f} | {ratio:.2f} × |"
        )
    return "\n".join(lines)
