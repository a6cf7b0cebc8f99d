"""The short table at the end of a call."""

from typing import Any

from benchmarks.gpu_call.results import Line, ended, lost, rows
from benchmarks.gpu_call.setting import LENGTHS
from benchmarks.shapes import hybrid
from megahybrid.config.counting import ideal_speedup

GOAL = {8192: 0.50, 32768: 0.47, 131072: 0.42}  # of 989 TFLOP/s, causal
# Times the speed of each library's best setting, by length.
PEER_GOALS = {
    "transformers": {8192: 1.25, 32768: 1.6, 131072: 2.5},
    "megatron-core": {8192: 1.10, 32768: 1.10, 131072: 1.10},
    "torchtitan": {8192: 1.05, 32768: 1.10, 131072: 1.15},
}


def table(lines: list[Line]) -> str:
    """Ceilings, kernels, steps, goals, peers, and what went wrong."""
    found = rows(lines)
    told = [
        *ceilings(found),
        *kernels(found),
        *steps(found),
        *goals(found),
        *libraries(found),
        *troubles(lines),
    ]
    return "\n".join(told)


def ceilings(found: list[dict[str, Any]]) -> list[str]:
    """What the card reaches without us."""
    told = []
    for row in found:
        if "bytes_per_second" in row:
            told.append(f"{row['ceiling']}: {row['bytes_per_second'] / 1e12:.2f} TB/s")
        elif "ceiling" in row and "flops_per_second" in row:
            told.append(f"{row['ceiling']}: {row['flops_per_second'] / 1e12:.0f} TFLOP/s")
        elif "seconds_per_token" in row:
            microseconds = row["seconds_per_token"] * 1e6
            told.append(f"{row['ceiling']}: {microseconds:.3f} µs a token")
        elif "agreement" in row:
            told.append(f"{row['agreement']}: {'agrees' if row['agrees'] else 'DOES NOT AGREE'}")
    return told


def kernels(found: list[dict[str, Any]]) -> list[str]:
    """TFLOP/s forward and backward of each kernel."""
    told = ["| kernel | layers | length | rows | forward ms | both ms | both TFLOP/s |"]
    told.append("|---|---|---|---|---|---|---|")
    for row in found:
        if "kernel" not in row:
            continue
        start = f"| {row['kernel']} | {row['layer']} | {row.get('length', '')} "
        if "left_out" in row:
            told.append(f"{start}| {row['left_out'][:90]} | | | |")
        else:
            told.append(
                f"{start}| {'packed' if row['packed'] else 'single'} "
                f"| {row['forward_seconds'] * 1e3:.2f} | {row['seconds'] * 1e3:.2f} "
                f"| {row['flops_per_second'] / 1e12:.0f} |"
            )
    return told if len(told) > 2 else []


def steps(found: list[dict[str, Any]]) -> list[str]:
    """Every whole step, ours and others'."""
    told = [
        "| part | length | tokens/s | causal MFU of 989 (790) | GiB | steps | how |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        if "step" not in row and "peer" not in row:
            continue
        if "left_out" in row:
            told.append(f"| {row['part']} | {row['length']} | {row['left_out']} | | | | |")
            continue
        how = row.get("setting") or f"{row['blocks']}, {row['recompute']}"
        told.append(
            f"| {row['part']} | {row['length']} | {row['tokens_per_second']:.0f} "
            f"| {row['mfu_989']:.1%} ({row['mfu_790']:.1%}) | {row['peak_gib']:.0f} "
            f"| {row['steps']} | {how} |"
        )
    return told if len(told) > 2 else []


def speed(found: list[dict[str, Any]], part: str, length: int) -> float | None:
    """Tokens a second of a part at a length."""
    speeds = [
        row["tokens_per_second"]
        for row in found
        if row["part"] == part and row.get("length") == length and "tokens_per_second" in row
    ]
    return speeds[-1] if speeds else None


def goals(found: list[dict[str, Any]]) -> list[str]:
    """Hybrid over full against the FLOPs, packed over whole rows, MFU against what is aimed at."""
    told = []
    for length in LENGTHS:
        ours, full = (
            speed(found, f"hybrid {length}", length),
            speed(found, f"full {length}", length),
        )
        if ours and full:
            ideal = ideal_speedup(hybrid("1b"), length)
            told.append(
                f"{length}: hybrid over full {ours / full:.3f}, ideal {ideal:.3f} "
                f"({ours / full / ideal:.0%}; goal 90%)"
            )
        for row in found:
            if row["part"] == f"hybrid {length}" and "mfu_989" in row:
                told.append(f"{length}: MFU {row['mfu_989']:.1%} (goal {GOAL[length]:.0%})")
    return told


def libraries(found: list[dict[str, Any]]) -> list[str]:
    """Ours over the fastest setting of each library. The two that have no parallel block are
    compared with our sequential one."""
    told = []
    for length in LENGTHS:
        for library, aimed in PEER_GOALS.items():
            cells = [
                row
                for row in found
                if row.get("title", "").startswith(library)
                and row["length"] == length
                and "tokens_per_second" in row
            ]
            part = f"hybrid {length}" if library == "transformers" else "sequential"
            ours = speed(found, part, length)
            if cells and ours:
                best = max(cells, key=lambda row: row["tokens_per_second"])
                ratio = ours / best["tokens_per_second"]
                told.append(
                    f"{length}: over {library}'s best, {best['title']}: {ratio:.2f} × "
                    f"(goal {aimed[length]:.2f} ×)"
                )
    return told


def troubles(lines: list[Line]) -> list[str]:
    """Parts that failed, were killed, or ended a call, with their last words."""
    told = [f"{name}: ended the call before it" for name in lost(lines)]
    failed = {name for name, code in ended(lines).items() if code}
    for line in lines:
        if line.kind == "end" and line.part in failed:
            last = (line.detail["tail"].splitlines() or [""])[-1]
            over = f", over {line.detail['over']}" if "over" in line.detail else ""
            told.append(f"{line.part}: exit code {line.detail['rc']}{over}: {last[:200]}")
    return told
