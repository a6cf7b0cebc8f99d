"""What one step of the 1B shape should take on one H200, part by part: to be held against the first
measurement, where a part that is off says where to look. Arithmetic, no measurement.

    python -m benchmarks.predict [--lengths 8192 32768 131072]
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import recompute
from benchmarks.gpu_call.setting import MICRO_BATCH_TOKENS
from benchmarks.gpu_call.step import MEMORY_SHARES, PEAK
from benchmarks.shapes import full, hybrid
from megahybrid.config.attention import AttentionScheme
from megahybrid.config.counting import (
    flops_per_token,
    matrix_parameters,
    mean_keys,
    parameters,
)
from megahybrid.config.model import ModelConfig

PRODUCTS = 660e12  # FLOP/s of a step's bf16 products; large ones of one shape reach 790
COPIES = 4.0e12  # bytes per second between products; copies alone reach 4.3
# FLOP/s forward and backward on Hopper, head_dim 128: arXiv 2407.08608 for FlashAttention 2 and
# cuDNN forward; cuDNN's backward is what others report, 450 to 550.
ATTENTION = {"varlen": (360e12, 337e12), "cudnn_frontend": (600e12, 500e12)}
WINDOW_TILES = 0.85  # of a windowed kernel's tiles that are inside the window, both edges counted
LOSS_BYTES = 14  # of each logit, its product's writing included
UPDATE_BYTES = 56  # of each parameter and step, clipping and new weights included
CARD = 139 * 2**30  # bytes
STATIC = Path(__file__).parent / "results/generated_code_sm90.json"


def layer_bytes() -> dict[str, float]:
    """Bytes a token that a compiled layer's own kernels move, by recompute policy: counted in the
    code generated for a rotated one. A chunked layer is taken for a selective one."""
    parts = json.loads(STATIC.read_text())["parts"]
    names = {"none": "parallel, 4 x 8k", "selective": "parallel selective, 1 x 128k"}
    return {
        policy: sum(kernel["bytes"] for program in parts[name] for kernel in program["kernels"])
        for policy, name in names.items()
    }


def predict(config: ModelConfig, length: int, windowed: str, in_full: str) -> dict[str, Any]:
    """Microseconds a token of each part, tokens per second and causal MFU of 989 TFLOP/s."""
    tokens = max(length, MICRO_BATCH_TOKENS)
    policies = recompute.solve(config, tokens, MEMORY_SHARES[0] * CARD, length)
    schemes = config.layer_plan.expand()
    moved = layer_bytes()
    # Chunked layers repeat the product with gate and up, and full ones all of theirs.
    hidden, inner = config.hidden_size, config.intermediate_size
    again = 4 * hidden * inner * policies.count("chunked")
    of_layers = matrix_parameters(config) - config.vocab_size * hidden
    again += 2 * of_layers // len(schemes) * policies.count("full")
    parts = {
        "products": (6 * matrix_parameters(config) + again) / PRODUCTS,
        "full attention": sum(
            attention_seconds(config, s, length, in_full) for s in schemes if s.window is None
        ),
        "windowed attention": sum(
            attention_seconds(config, s, length, windowed) for s in schemes if s.window
        ),
        "between products": sum(moved.get(p, moved["selective"]) for p in policies) / COPIES,
        "loss": LOSS_BYTES * config.vocab_size / COPIES,
        "update": UPDATE_BYTES * parameters(config) / COPIES / tokens,
    }
    seconds = sum(parts.values())
    return {
        "length": length,
        "microseconds": {name: value * 1e6 for name, value in parts.items()},
        "recompute": {name: policies.count(name) for name in dict.fromkeys(policies)},
        "tokens_per_second": 1 / seconds,
        "mfu": flops_per_token(config, length) / seconds / PEAK,
    }


def attention_seconds(
    config: ModelConfig, scheme: AttentionScheme, length: int, kernel: str
) -> float:
    """Of one layer and token: two products forward, five backward."""
    flops = 4 * config.num_heads * config.head_dim * mean_keys(length, scheme.window)
    forward, backward = ATTENTION[kernel]
    tiles = WINDOW_TILES if scheme.window is not None and scheme.window < length else 1.0
    return flops * (1 / forward + 2.5 / backward) / tiles


def table(rows: list[tuple[str, dict[str, Any]]]) -> str:
    """Markdown."""
    names = list(rows[0][1]["microseconds"])
    lines = [
        f"| length | step of | {' | '.join(names)} | tokens/s | MFU |",
        "|---" * (len(names) + 4) + "|",
    ]
    for label, row in rows:
        parts = " | ".join(f"{row['microseconds'][name]:.2f}" for name in names)
        lines.append(
            f"| {row['length']:,} | {label} | {parts} "
            f"| {row['tokens_per_second']:,.0f} | {100 * row['mfu']:.0f} % |"
        )
    return "\n".join(lines)


def expected(lengths: list[int]) -> list[tuple[str, dict[str, Any]]]:
    """Hybrid by both kernels of its windows, and full."""
    rows = []
    for length in lengths:
        for windowed in ATTENTION:
            found = predict(hybrid("1b"), length, windowed, "cudnn_frontend")
            rows.append((f"hybrid, windows by `{windowed}`", found))
        rows.append(("full", predict(full("1b"), length, "varlen", "cudnn_frontend")))
    return rows


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    print(table(expected(parser.parse_args().lengths)))


if __name__ == "__main__":
    main()
