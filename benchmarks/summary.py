"""The short table at the end of the plan for one GPU."""

from benchmarks.ours import PEAK
from benchmarks.plan import Plan
from benchmarks.shapes import full, hybrid
from megahybrid.config.counting import flops_per_token, full_attention, ideal_speedup

MUST, GOAL = {8192: 0.42, 32768: 0.38, 131072: 0.34}, {8192: 0.50, 32768: 0.47, 131072: 0.42}
# Times the speed of each library's best setting, by length.
PEER_GOALS = {
    "transformers": {8192: 1.25, 32768: 1.6, 131072: 2.5},
    "megatron-core": {8192: 1.10, 32768: 1.10, 131072: 1.10},
    "torchtitan": {8192: 1.05, 32768: 1.10, 131072: 1.15},
}


def summary(plan: Plan) -> str:
    """Rows, hybrid over full against the ideal, goals, the best of each library, notes."""
    lines = [
        "| length | step of | tokens/s | causal MFU of 989 (790) | GiB | steps | ours is | how |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(plan.rows, key=lambda row: row["length"]):
        ratio = f"{row['ours_is']:.2f} ×" if "ours_is" in row else ""
        how = row.get("setting") or row.get("recompute", "")
        lines.append(
            f"| {row['length']} | {row['kind']} | {row['tokens_per_second']:.0f} "
            f"| {row['mfu_989']:.1%} ({row['mfu_790']:.1%}) | {row['peak_gib']:.0f} "
            f"| {row['steps']} | {ratio} | {how} |"
        )
    return "\n".join(lines + against_goals(plan) + against_libraries(plan) + plan.notes)


def against_goals(plan: Plan) -> list[str]:
    """Hybrid over full against the FLOPs, and the MFU against what was promised."""
    lines = []
    speeds = {(row["kind"], row["length"]): row["tokens_per_second"] for row in plan.rows}
    config = hybrid(plan.options.shape)
    assert full_attention(config.layer_plan) == full(plan.options.shape).layer_plan
    for length in plan.options.lengths:
        if ("hybrid", length) not in speeds:
            continue
        if ("full", length) in speeds:
            ratio = speeds["hybrid", length] / speeds["full", length]
            ideal = ideal_speedup(config, length)
            lines.append(
                f"{length}: hybrid over full {ratio:.3f}, ideal {ideal:.3f} ({ratio / ideal:.0%})"
            )
        if length in GOAL and plan.options.shape == "1b":
            mfu = speeds["hybrid", length] * flops_per_token(config, length) / PEAK
            lines.append(
                f"{length}: MFU {mfu:.1%} (must {MUST[length]:.0%}, goal {GOAL[length]:.0%})"
            )
    return lines


def against_libraries(plan: Plan) -> list[str]:
    """Ours over the fastest setting of each library, from the cells where both took turns."""
    lines = []
    for length in plan.options.lengths:
        for library, goals in PEER_GOALS.items():
            cells = [
                row
                for row in plan.rows
                if row["length"] == length and row["kind"].startswith(library) and "ours_is" in row
            ]
            if cells:
                best = min(cells, key=lambda row: row["ours_is"])
                goal = f" (goal {goals[length]:.2f} ×)" if length in goals else ""
                name, ratio = best["kind"], best["ours_is"]
                lines.append(f"{length}: over {library}'s best, {name}: {ratio:.2f} ×{goal}")
    return lines
