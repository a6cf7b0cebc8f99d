"""The self-test before step 0: does each scheme, on this device, see and compute what it says?

Synthetic q, k and v go through a block's own code, with the heads, dtype and kernel of the run.
Never the run's weights: on trained or bf16 weights a distant token may move nothing, and a wrong
window would pass. Nothing is drawn at random but from generators of the test's own.
"""

import time
from collections.abc import Collection, Mapping

import torch

from megahybrid.config.attention import AttentionScheme
from megahybrid.errors import AuditError
from megahybrid.model.selftest.across_ranks import run_context_test
from megahybrid.model.selftest.questions import OneScheme, own_rows
from megahybrid.model.selftest.subject import Contexts, HeadShape, Violation

__all__ = ["HeadShape", "own_rows", "run_context_test", "run_self_test"]


def run_self_test(
    schemes: Mapping[str, AttentionScheme],
    shape: HeadShape,
    kernels: Mapping[str, str],
    rank: int,
    *,
    passed: Collection[str] = (),
    compiler: str | None = None,
    whole: bool = False,
) -> list[tuple[str, str, float]]:
    """(scheme, kernel, seconds) of every scheme; `kernels` holds each one's name for attend().

    `passed` names schemes that were tested before: they are asked only beside the others, as layers
    of one batch. `compiler` compiles the blocks asked there, `whole` or in pieces, as the run does.
    Raises AuditError with scheme, kernel, rank and what was violated.
    """
    report: dict[str, tuple[str, float]] = {}
    contexts = Contexts(shape)
    asked = [(name, False) for name in schemes if name not in passed]
    for name, together in asked + [(name, True) for name in schemes if asked]:
        began = time.perf_counter()
        one = OneScheme(schemes[name], kernels[name], shape, contexts, compiler, whole)
        try:
            with torch.enable_grad():
                one.beside_others() if together else one.alone()
        except Violation as violation:
            raise AuditError(
                f"self-test: scheme '{name}' with kernel {one.kernel_name()} on rank {rank} "
                f"{violation}. Do not train with it: choose another kernel, or mend this one."
            ) from None
        before = report[name][1] if name in report else 0.0
        report[name] = (one.kernel_name(), before + time.perf_counter() - began)
    return [(name, *found) for name, found in report.items() if name not in passed]
