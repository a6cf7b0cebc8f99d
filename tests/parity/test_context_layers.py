"""Rows cut over context ranks are the rows of one process: float64, without DeepSpeed."""

from typing import Any

import pytest

from megahybrid.config.context_plan import exchange_problems
from megahybrid.config.parallel import ExchangeConfig, ParallelConfig
from tests import distributed
from tests.parity.cases import BLOCKS, every_layer_case
from tests.parity.test_layers import SEQ, Errors, case_errors, wrong

# What full and windowed layers exchange, and how rows lie.
EXCHANGES = [
    {"full": "heads", "windowed": "halo", "layout": "contiguous"},
    {"full": "keys", "windowed": "halo", "layout": "zigzag"},
    {"full": "keys", "windowed": "keys", "layout": "contiguous"},
    {"full": "heads", "windowed": "heads", "layout": "zigzag"},
]


MESHES = [(1, 2), (1, 4), (2, 2), (2, 4)]  # tensor and context ranks


def with_exchange(
    case: dict[str, Any], tensor: int, context: int, number: int
) -> tuple[str, dict[str, Any]]:
    """The case with one of the exchanges, in words too; keys where its heads do not allow heads."""
    exchange, config = EXCHANGES[number % len(EXCHANGES)], case["config"]
    told = ParallelConfig(tensor=tensor, context=context, exchange=ExchangeConfig(**exchange))
    if exchange_problems(config, told, config.layer_plan, SEQ):
        exchange = {field: {"heads": "keys"}.get(word, word) for field, word in exchange.items()}
    return "-".join(exchange.values()), case | {"exchange": exchange}


def covering(tensor: int, context: int) -> dict[str, dict[str, Any]]:
    """A quarter of all cases, each with one exchange: over the meshes every case is met, and with
    every fourth of a family another exchange."""
    mesh, cases = MESHES.index((tensor, context)), {}
    for number, (name, case) in enumerate(every_layer_case().items()):
        if number % len(MESHES) == mesh:
            words, chosen = with_exchange(case, tensor, context, number // len(MESHES))
            cases[f"{name}-{words}"] = chosen
    return cases


def whole_grid(tensor: int, context: int) -> dict[str, dict[str, Any]]:
    """Every case with every exchange."""
    cases = {}
    for name, case in every_layer_case().items():
        for number in range(len(EXCHANGES)):
            words, chosen = with_exchange(case, tensor, context, number)
            cases[f"{name}-{words}"] = chosen
    return cases


def context_errors(
    ranks: distributed.Ranks, tensor: int, context: int, cases: dict[str, dict[str, Any]]
) -> dict[str, Errors]:
    """Every case on this rank's mesh."""
    mesh = ranks.mesh(tensor, context)
    return {name: case_errors(mesh, **case) for name, case in cases.items()}


def hold(tensor: int, context: int, cases: dict[str, dict[str, Any]], seconds: float) -> None:
    results = distributed.run(
        tensor * context, context_errors, tensor, context, cases, timeout_seconds=seconds
    )
    assert all(result.keys() == cases.keys() for result in results)
    assert not wrong(results), "\n".join(wrong(results))


@pytest.mark.parametrize(("tensor", "context"), MESHES)
def test_loss_and_every_gradient_equal_the_plain_model(tensor: int, context: int) -> None:
    hold(tensor, context, covering(tensor, context), 250)


@pytest.mark.grid
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("tensor", "context"), MESHES)
def test_every_exchange_equals_the_plain_model(tensor: int, context: int) -> None:
    hold(tensor, context, whole_grid(tensor, context), 1700)


def test_the_cases_meet_every_exchange_and_recomputation() -> None:
    """What a quarter leaves out on one mesh it has on another."""
    met = {
        (config.block, case["recompute"], tuple(case["exchange"].values()))
        for tensor, context in MESHES
        for case in covering(tensor, context).values()
        if (config := case["config"])
    }
    assert {block for block, _, _ in met} == set(BLOCKS)
    words = {exchange for _, _, exchange in met}
    assert {tuple(exchange.values()) for exchange in EXCHANGES} <= words
    assert {(r, e) for _, r, e in met} >= {
        (r, tuple(e.values())) for r in ("none", "selective", "full") for e in EXCHANGES
    }
    names = {name.rsplit("-", 3)[0] for mesh in MESHES for name in covering(*mesh)}
    assert names == set(every_layer_case())
