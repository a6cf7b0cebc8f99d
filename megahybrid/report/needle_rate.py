"""How often needles were found within the trained length, and beyond."""

from collections.abc import Sequence
from dataclasses import dataclass

from megahybrid.report.kept import Kept


@dataclass(frozen=True)
class NeedleRate:
    """Shares of trials whose whole answer was right, over all depths and needle tasks."""

    within: float
    beyond: float | None  # None: nothing longer was asked
    trials: int  # within
    trained: int


def needle_rate(kept: Sequence[Kept]) -> NeedleRate | None:
    """Over every needle task of the newest suites; None where there is none within the length."""
    within: list[tuple[float, int]] = []
    beyond: list[tuple[float, int]] = []
    trained = 0
    for one in kept:
        if one.kind != "suite" or not one.result.get("trained_length"):
            continue
        trained = one.result["trained_length"]
        for told in one.result["tasks"].values():
            if told["kind"] == "needle":
                for row in told["rows"]:
                    trials = row.get("trials", told["trials"])
                    near = row["length"] <= trained
                    (within if near else beyond).append((row["exact"] * trials, trials))
    if not within:
        return None
    trials = sum(count for _, count in within)
    past = sum(count for _, count in beyond)
    return NeedleRate(
        sum(right for right, _ in within) / trials,
        sum(right for right, _ in beyond) / past if past else None,
        trials,
        trained,
    )
