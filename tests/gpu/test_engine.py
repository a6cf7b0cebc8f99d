"""The engine on a device is the engine on the CPU: bf16, every block, recompute policy, plain and
compiled layers, packed and whole rows, against the plain training loop in fp64."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from megahybrid.config.model import ModelConfig
from tests import distributed
from tests.gpu.on_device import COMPILERS, Worker
from tests.model.test_compiled import fresh_compiler
from tests.parity.cases import BLOCKS
from tests.parity.test_engine import Case, RankRun, engine_run, plain_run, whole_errors

POLICIES = ("none", "selective", "chunked", "full", "offload")
# So small that one key more or less is seen through bf16's rounding.
WINDOW, LENGTH = 9, 128
BOUND = 2.0


def case_of(block: str, device: str = "cpu", policy: str = "none", compiled: bool = False) -> Case:
    """Heads of 64, as kernels want them; a packed and a whole micro-batch in each step."""
    config = ModelConfig.model_validate(
        {
            "vocab_size": 200,
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_heads": 2,
            "num_kv_heads": 1,
            "block": block,
            "norm": "rms" if block == "post_norm" else "layernorm",
            "layer_plan": {
                "num_layers": 2,
                "pattern": ["local", "global"],
                "schemes": {
                    "local": {
                        "position": {"kind": "rope", "theta": 10000.0},
                        "window": WINDOW,
                        "qk_norm": {"kind": "rms"},
                    },
                    "global": {"position": {"kind": "nope"}},
                },
            },
        }
    )
    return Case(
        config,
        accumulation=2,
        recompute=policy,
        precision="bf16",
        compiler=COMPILERS[device] if compiled else None,
        seq=LENGTH,
        whole_rows=True,
        device=device,
    )


@cache
def truth_of(block: str) -> Any:
    """The plain loop, in fp64."""
    return plain_run(case_of(block))


@cache
def errors_on_the_cpu(block: str) -> dict[str, float]:
    """How far the engine is from it on the CPU, with nothing recomputed or compiled."""
    case = case_of(block)
    return whole_errors(case, distributed.run(1, engine_run, case), truth_of(block))


def run_alone(ranks: distributed.Ranks, case: Case) -> RankRun:
    """One engine; annotations are not checked in what is compiled."""
    if case.compiler is None:
        return engine_run(ranks, case)
    with fresh_compiler():
        return engine_run(ranks, case)


def too_far(block: str, run: RankRun, case: Case) -> dict[str, tuple[float, float]]:
    """What is further from the truth than twice the CPU's plain engine is. A single loss may be
    right by luck: it is judged by a bf16 number's own step."""
    found, usual = whole_errors(case, [run], truth_of(block)), errors_on_the_cpu(block)
    floors = {"losses": 2e-3, "norms": 4e-3}
    return {
        what: (error, usual[what])
        for what, error in found.items()
        if not error <= BOUND * max(usual[what], floors.get(what, 0.0))
    }


@pytest.fixture(scope="module")
def workers() -> Iterator[dict[str, Worker]]:
    made = {device: Worker(device) for device in COMPILERS}
    yield made
    for worker in made.values():
        worker.end()


def check(worker: Worker, block: str, policy: str, compiled: bool) -> None:
    case = case_of(block, worker.device, policy, compiled)
    assert too_far(block, worker.run(run_alone, case), case) == {}


ON_A_CARD = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("device", [ON_A_CARD])
def test_the_engine_on_a_card_is_as_near_the_truth_as_on_the_cpu(
    workers: dict[str, Worker], device: str, block: str, policy: str
) -> None:
    check(workers[device], block, policy, compiled=False)


# Every policy and every block; a compiler's minute is dear on a lent card.
COMPILED = [
    ("parallel", "none"),
    ("pre_norm", "selective"),
    ("post_norm", "chunked"),
    ("parallel", "full"),
    ("pre_norm", "offload"),
]


@pytest.mark.parametrize(("block", "policy"), COMPILED)
@pytest.mark.parametrize("device", [ON_A_CARD])
def test_compiled_layers_on_a_card_are_as_near_the_truth_as_plain_ones_on_the_cpu(
    workers: dict[str, Worker], device: str, block: str, policy: str
) -> None:
    check(workers[device], block, policy, compiled=True)


@pytest.mark.slow
@pytest.mark.parametrize(("block", "policy"), [("parallel", "selective"), ("pre_norm", "chunked")])
def test_the_same_holds_between_two_ways_on_the_cpu(
    workers: dict[str, Worker], block: str, policy: str
) -> None:
    check(workers["cpu"], block, policy, compiled=block == "parallel")


@pytest.mark.slow
def test_a_window_of_one_key_less_is_too_far(workers: dict[str, Worker]) -> None:
    case = case_of("parallel")
    plan = case.config.layer_plan
    narrow = plan.schemes["local"].model_copy(update={"window": WINDOW - 1})
    plan = plan.model_copy(update={"schemes": plan.schemes | {"local": narrow}})
    case = replace(case, config=case.config.model_copy(update={"layer_plan": plan}))
    assert "gradient" in too_far("parallel", workers["cpu"].run(run_alone, case), case)
