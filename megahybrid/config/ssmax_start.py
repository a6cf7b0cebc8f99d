"""Where SSMax's learned s begin when a run file leaves that out."""

import math
from collections.abc import Mapping

from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.score_scale import SsmaxScale

WITHOUT_A_RUN = 0.168  # at 1,024 tokens: a model alone knows no length


def start_of(scale: SsmaxScale) -> float:
    """The value every s starts at; a run has it written out."""
    return WITHOUT_A_RUN if scale.initial is None else scale.initial


def with_starts(plan: LayerPlan, lengths: Mapping[int, int]) -> LayerPlan:
    """The plan with `initial` of every ssmax scheme written out, by the first stage's `lengths`
    with their ratio by sequences; the same object where nothing was left out.

    A mean factor of 1 leaves scores as sharp as without SSMax. With the factor of a figure of arXiv
    2501.19399, 0.43, those at 8k would begin 3.9 times too sharp.
    """
    changed = {
        name: scheme.model_copy(
            update={
                "score_scale": scheme.score_scale.model_copy(
                    update={"initial": ssmax_start(lengths, scheme.reach)}
                )
            }
        )
        for name, scheme in plan.schemes.items()
        if isinstance(scheme.score_scale, SsmaxScale) and scheme.score_scale.initial is None
    }
    return plan.model_copy(update={"schemes": plan.schemes | changed}) if changed else plan


def ssmax_start(lengths: Mapping[int, int], window: int | None) -> float:
    """1 / the mean of ln n over the queries of documents of these lengths, n the visible keys; 1
    where no query sees two. Six digits: libraries differ in the last, and runs move between
    machines."""
    queries = sum(length * ratio for length, ratio in lengths.items())
    total = sum(ratio * _logarithms(length, window) for length, ratio in lengths.items())
    return float(f"{queries / total:.6g}") if total > 0 else 1.0


def _logarithms(length: int, window: int | None) -> float:
    """The sum of ln n over the queries of one document."""
    growing = min(length, window or length)
    return math.lgamma(growing + 1) + (length - growing) * math.log(growing)
