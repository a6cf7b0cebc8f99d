"""Training on context ranks through DeepSpeed is the plain training loop: fp32, ZeRO 1 to 3."""

from dataclasses import replace
from typing import Any

import pytest

from tests import distributed
from tests.parity.cases import model
from tests.parity.test_engine import BOUND, CLIP_NORM, Case, engine_runs, errors, plain_run

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


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_five_steps_equal_the_plain_training_loop(world_size: int) -> None:
    cases = {
        name: replace(case, seed=100 + seed)
        for seed, (name, case) in enumerate(CASES.items())
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
