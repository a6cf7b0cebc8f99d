"""Every attention kernel that this machine has, on the heads of a shape: useful FLOP/s.

python -m benchmarks.kernels [--device cuda] [--shape 1b] [--lengths 8192 32768]
"""

import argparse
import statistics
import sys
from typing import Any

import torch

from benchmarks.machine import heading, machine, write
from benchmarks.shapes import SHAPES
from benchmarks.timing import timed
from megahybrid.config.counting import attended_pairs
from megahybrid.errors import ConfigError
from megahybrid.model.kernels import KERNELS, AttentionSpec, attend
from megahybrid.model.kernels.choice import why_it_failed

NAMES = [name for name in KERNELS if name != "reference"]


def main(arguments: list[str] | None = None) -> int:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shape", default="25m", choices=SHAPES)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    facts = machine(device)
    print(heading(facts))
    rows = [
        row for length in options.lengths for row in measure(options.shape, length, device, dtype)
    ]
    print(table(rows))
    path = write(f"kernels_{options.device}", {"machine": facts, "rows": rows})
    print(f"all times: {path}")
    return 0


def measure(
    shape: str, length: int, device: torch.device, dtype: torch.dtype, repeats: int = 5
) -> list[dict[str, Any]]:
    """Median seconds of forward, and of forward and backward, of every kernel for both kinds of
    layer; what refuses has no row, what fails tells why."""
    sizes = SHAPES[shape]
    head_dim = sizes["hidden_size"] // sizes["num_heads"]
    heads, kv_heads = sizes["num_heads"], sizes["num_kv_heads"]
    q = torch.randn(length, 1, heads, head_dim, device=device, dtype=dtype, requires_grad=True)
    k, v = (
        torch.randn(length, 1, kv_heads, head_dim, device=device, dtype=dtype, requires_grad=True)
        for _ in range(2)
    )
    grad_output = torch.randn_like(q)
    rows = []
    for window in (None, sizes["window"]):
        pairs = attended_pairs(length, window) * heads * head_dim
        for name in NAMES:
            if window is None and name == "blocked":
                continue  # it is sdpa there
            row: dict[str, Any] = {"length": length, "window": window, "kernel": name}

            def forward(window: int | None = window, name: str = name) -> torch.Tensor:
                return attend(q, k, v, AttentionSpec(window=window, scale=head_dim**-0.5), name)

            def both(forward: Any = forward) -> None:
                torch.autograd.grad(forward(), (q, k, v), grad_output)

            try:
                for _ in range(2):
                    both()
                seconds = [timed(forward, device) for _ in range(repeats)]
                seconds_both = [timed(both, device) for _ in range(repeats)]
            except ConfigError:
                continue  # it refuses: no such kernel for this layer on this machine
            except Exception as error:  # a kernel may fail in any way
                row["left_out"] = why_it_failed(error)
            else:
                # On a CPU the process's own seconds, which neighbours disturb least.
                clock = 0 if device.type == "cuda" else 1
                row["forward"] = statistics.median(value[clock] for value in seconds)
                row["both"] = statistics.median(value[clock] for value in seconds_both)
                # 2 products forward and 5 backward (one of them repeated), 2 FLOPs each.
                row["forward_flops_per_second"] = 4 * pairs / row["forward"]
                row["flops_per_second"] = 14 * pairs / row["both"]
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """What people read; FLOP/s count the pairs that the mask lets through."""
    lines = [
        "| length | window | kernel | forward ms | both ms | forward GFLOP/s | both GFLOP/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row['length']} | {row['window'] or 'full'} | {row['kernel']} |"
        if "left_out" in row:
            lines.append(f"{start} {row['left_out']} | | | |")
        else:
            lines.append(
                f"{start} {row['forward'] * 1e3:.2f} | {row['both'] * 1e3:.2f} "
                f"| {row['forward_flops_per_second'] / 1e9:.0f} "
                f"| {row['flops_per_second'] / 1e9:.0f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
