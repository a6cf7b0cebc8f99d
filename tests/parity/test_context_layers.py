"""Rows cut over context ranks are the rows of one process: float64, without DeepSpeed."""

from typing import Any

import pytest

from tests import distributed
from tests.parity.cases import every_layer_case
from tests.parity.test_layers import Errors, case_errors, wrong

# What full and windowed layers exchange, and how rows lie.
EXCHANGES = [
    {"full": "heads", "windowed": "halo", "layout": "contiguous"},
    {"full": "keys", "windowed": "halo", "layout": "zigzag"},
    {"full": "keys", "windowed": "keys", "layout": "contiguous"},
    {"full": "heads", "windowed": "heads", "layout": "zigzag"},
]


def covering(tensor: int, context: int) -> dict[str, dict[str, Any]]:
    """Every family × block × norm, in turn with each of the exchanges that its heads allow."""
    cases = {}
    for number, (name, case) in enumerate(every_layer_case().items()):
        exchange = EXCHANGES[(number + tensor + context) % len(EXCHANGES)]
        heads, kv = 4 // tensor, max(1, case["config"].num_kv_heads // tensor)
        if heads % context or (kv % context and context % kv):
            exchange = {field: {"heads": "keys"}.get(v, v) for field, v in exchange.items()}
        words = "-".join(exchange.values())
        cases[f"{name}-{words}"] = case | {"exchange": exchange}
    return cases


def context_errors(
    ranks: distributed.Ranks, tensor: int, context: int, cases: dict[str, dict[str, Any]]
) -> dict[str, Errors]:
    """Every case on this rank's mesh."""
    mesh = ranks.mesh(tensor, context)
    return {name: case_errors(mesh, **case) for name, case in cases.items()}


@pytest.mark.parametrize(
    ("tensor", "context"),
    [(1, 2), (1, 4), (2, 2), (2, 4)],
    ids=lambda value: str(value),
)
def test_loss_and_every_gradient_equal_the_plain_model(tensor: int, context: int) -> None:
    cases = covering(tensor, context)
    results = distributed.run(
        tensor * context, context_errors, tensor, context, cases, timeout_seconds=300
    )
    assert all(result.keys() == cases.keys() for result in results)
    assert not wrong(results), "\n".join(wrong(results))
