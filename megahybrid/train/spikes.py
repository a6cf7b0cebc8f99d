"""The rule for spikes: steps that would do harm, because their loss or gradient norm is far above
that of the last steps.

The rule is OLMo's (SkipStepOptimizer): more than so many standard deviations above the mean of the
last so many steps, once half of them are there. Every rank judges the same numbers alike.
"""

import statistics
from collections.abc import Sequence

from megahybrid.config.training import SpikeConfig

Recent = tuple[tuple[float, float], ...]  # (loss, gradient norm) of steps not skipped


def judge_spike(rule: SpikeConfig, recent: Recent, loss: float, norm: float) -> str | None:
    """Return why a step is a spike, in words; None when it is none."""
    if len(recent) < max(2, rule.over_steps // 2):
        return None
    columns = zip(*recent, strict=True)
    for name, value, seen in zip(("loss", "gradient norm"), (loss, norm), columns, strict=True):
        excess = _deviations(value, seen)
        if excess > rule.sigmas:
            return (
                f"spike: {name} {value:.4g} is {excess:.1f} deviations above the mean "
                f"{statistics.fmean(seen):.4g} of the last {len(recent)} steps"
            )
    return None


def remember(rule: SpikeConfig, recent: Recent, loss: float, norm: float) -> Recent:
    """Return the last steps with one more. One that was refused is left out: it would blind the
    rule."""
    return (*recent, (loss, norm))[-rule.over_steps :]


def _deviations(value: float, seen: Sequence[float]) -> float:
    spread = statistics.pstdev(seen)
    above = value - statistics.fmean(seen)
    if spread == 0:
        return float("inf") if above > 0 else 0.0
    return above / spread
