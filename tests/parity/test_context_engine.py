"""Training on context ranks through DeepSpeed is the plain training loop: fp32, ZeRO 1 to 3."""

from dataclasses import replace
from typing import Any

import jaxtyping
import pytest

from tests import distributed
from tests.parity.cases import model
from tests.parity.test_engine import (
    BOUND,
    CLIP_NORM,
    Case,
    RankRun,
    bf16_is_close,
    engine_run,
    engine_runs,
    errors,
    of_one_process,
    plain_run,
)

ZIGZAG = (("full", "keys"), ("layout", "zigzag"))
HEADS = (("full", "heads"), ("windowed", "halo"))
KEYS = (("full", "keys"), ("windowed", "keys"), ("layout", "contiguous"))


def case(family: str, block: str = "pre_norm", kv_heads: int = 2, **fields: Any) -> Case:
    return Case(model(family, block, kv_heads=kv_heads), **fields)


CASES = {
    "context2-zero1": case("rnope_swa", context=2, accumulation=2, exchange=HEADS),
    "context2-zero2": case(
        "llama4-log", "post_norm", context=2, zero_stage=2, recompute="full", exchange=ZIGZAG
    ),
    "context2-zero3": case(
        "ssmax", "parallel", context=2, zero_stage=3, recompute="selective", exchange=KEYS
    ),
    "context2-zero2-fused": case(
        "fused", "parallel", context=2, zero_stage=2, recompute="full", exchange=HEADS
    ),
    "context4-zero1": case("partial", "parallel", context=4, exchange=ZIGZAG, recompute="offload"),
    "context4-zero3": case("rnope_swa", kv_heads=4, context=4, zero_stage=3, accumulation=2),
    "tensor2-context2-zero2": case(
        "layernorm-per_head", "post_norm", tensor=2, context=2, zero_stage=2, exchange=ZIGZAG
    ),
    "data2-context2-zero1": case(
        "projection", "parallel", data=2, context=2, recompute="chunked", exchange=HEADS
    ),
    "tensor2-data2-context2-zero3": case(
        "window-one-key", tensor=2, data=2, context=2, zero_stage=3, recompute="full"
    ),
    "tensor2-context4-zero1": case("rnope_swa", kv_heads=1, tensor=2, context=4, exchange=ZIGZAG),
}

TWO_VIEWS = {
    "context2-zero3-fused": case("fused", context=2, zero_stage=3, exchange=ZIGZAG, accumulation=2),
    "context2-zero1-split": case("split", context=2, recompute="offload", exchange=ZIGZAG),
    "tensor2-context2-zero3-fused": case(
        "fused", "post_norm", tensor=2, context=2, zero_stage=3, exchange=KEYS
    ),
}


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_five_steps_equal_the_plain_training_loop(world_size: int) -> None:
    trained_alike(CASES, world_size)


@pytest.mark.parametrize("world_size", [2, 4])
def test_five_steps_with_two_views_equal_the_plain_training_loop(world_size: int) -> None:
    trained_alike(TWO_VIEWS, world_size)


def trained_alike(of: dict[str, Case], world_size: int) -> None:
    """Hold the cases of so many ranks to the plain loop."""
    cases = {
        name: replace(case, seed=100 + seed)
        for seed, (name, case) in enumerate(of.items())
        if case.world_size == world_size
    }
    runs = distributed.run(world_size, engine_runs, list(cases.values()), timeout_seconds=240)
    wrong = []
    for index, (name, case) in enumerate(cases.items()):
        truth = plain_run(case)
        assert min(truth.norms) > CLIP_NORM  # clipping is active
        found = errors(case, [of_rank[index] for of_rank in runs], truth)
        wrong += [f"{e:.1e} {name}: {what}" for what, e in found.items() if not e <= BOUND]
    assert not wrong, "\n".join(sorted(wrong, reverse=True))


def test_bf16_is_no_further_from_the_truth_than_twice_a_single_process() -> None:
    cases = {
        "context2-zero1": case("rnope_swa", "parallel", context=2, accumulation=2, exchange=HEADS),
        "context4-zero2": case("ssmax", context=4, zero_stage=2, exchange=ZIGZAG),
        "tensor2-context2-zero3": case(
            "rms-shared", "post_norm", tensor=2, context=2, zero_stage=3, exchange=KEYS
        ),
    }
    bf16 = {name: replace(case, precision="bf16", seed=60) for name, case in cases.items()}
    bf16_is_close({name: (case, of_one_process(case)) for name, case in bf16.items()})


def traced_runs(ranks: distributed.Ranks, case: Case) -> RankRun:
    """A run whose layers are traced; checks of annotations cannot be."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        return engine_run(ranks, case)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("family", "exchange"),
    [("rnope_swa", HEADS), ("rnope_swa", ZIGZAG), ("fused", HEADS), ("fused", ZIGZAG)],
    ids=["heads", "keys_zigzag", "fused-heads", "fused-keys_zigzag"],
)
def test_compiled_layers_are_the_plain_ones(
    family: str, exchange: tuple[tuple[str, str], ...]
) -> None:
    compiled = case(family, context=2, exchange=exchange, compiler="aot_eager", seed=70)
    found = errors(compiled, distributed.run(2, traced_runs, compiled), plain_run(compiled))
    assert not {what: error for what, error in found.items() if not error <= BOUND}
