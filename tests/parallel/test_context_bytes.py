"""What context ranks receive, counted at the process group, is what the formulas say."""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch

from megahybrid.config.context import HeadShape, exchange_bytes, segments_per_rank
from megahybrid.config.context_plan import plan_context
from megahybrid.config.context_volume import received_bytes
from megahybrid.config.parallel import ParallelConfig
from tests import distributed
from tests.parity.cases import HEADS, WINDOW, model

ROWS, LENGTH, WIDTH = 2, 64, 4  # bytes of an fp32 value
WINDOWS = (WINDOW, None)  # of the two layers of rnope_swa
RANKS = 4


@dataclass(frozen=True)
class Case:
    """A model of one windowed and one full layer on `context` ranks of a row."""

    full: str
    windowed: str
    layout: str
    context: int = 4
    tensor: int = 1
    kv_heads: int = 2
    recompute: str = "none"
    length: int = LENGTH
    family: str = "rnope_swa"

    @property
    def layers(self) -> list[tuple[int | None, HeadShape]]:
        """The window of each exchange, and the heads of a tensor rank that it is for."""
        g = max(1, self.kv_heads // self.tensor)
        every = HeadShape(HEADS // self.tensor, g, 8)
        match self.family:
            case "fused":  # by token over a far view of 9 keys, and by head over all
                return [(9, replace(every, gates=every.heads)), (None, every)]
            case "split":  # half of the key heads see WINDOW keys; then fused by one number
                half = HeadShape(every.heads // 2, g // 2, 8)
                return [(WINDOW, half), (None, half), (None, every)]
            case _:
                return [(window, every) for window in WINDOWS]

    def received(self, rank: int) -> int:
        """The exact number of bytes for attention of one context rank."""
        forward_again = self.recompute in ("full", "offload")
        total = 0
        for window, shape in self.layers:
            exchange: Any = self.full if window is None else self.windowed
            layout: Any = self.layout
            total += received_bytes(
                *(exchange, window, self.length, self.context, shape),
                layout=layout,
                rank=rank,
                bytes_per_value=WIDTH,
            ).total(forward_again=forward_again)
        return ROWS * total

    def nominal(self) -> int:
        """The published formula, of a rank with a whole halo before each segment."""
        forward_again = self.recompute in ("full", "offload")
        layout: Any = self.layout
        total = 0
        for window, shape in self.layers:
            exchange: Any = self.full if window is None else self.windowed
            total += exchange_bytes(
                *(exchange, window, self.length, self.context, shape),
                segments=segments_per_rank(layout),
                bytes_per_value=WIDTH,
            ).total(forward_again=forward_again)
        return ROWS * total


CASES = {
    f"{full}-{windowed}-{layout}-{recompute}": Case(full, windowed, layout, recompute=recompute)
    for (full, windowed), layout, recompute in product(
        (("heads", "halo"), ("keys", "heads"), ("heads", "keys")),
        ("contiguous", "zigzag"),
        ("none", "full"),
    )
} | {
    "context2": Case("heads", "halo", "contiguous", context=2),
    "context2-zigzag-offload": Case("keys", "halo", "zigzag", context=2, recompute="offload"),
    "selective": Case("keys", "halo", "zigzag", recompute="selective"),
    "one-kv-head": Case("heads", "heads", "contiguous", kv_heads=1),
    "as-many-kv-heads": Case("heads", "halo", "zigzag", kv_heads=4),
    "tensor2": Case("heads", "halo", "contiguous", context=2, tensor=2),
    "tensor2-one-kv-head": Case("keys", "halo", "zigzag", context=2, tensor=2, kv_heads=1),
    "fused-halo-keys": Case("keys", "halo", "zigzag", family="fused"),
    "fused-halo-heads-full": Case("heads", "halo", "contiguous", family="fused", recompute="full"),
    "fused-heads": Case("heads", "heads", "zigzag", family="fused", kv_heads=1),
    "fused-keys-tensor2": Case("keys", "keys", "contiguous", context=2, tensor=2, family="fused"),
    "split-halo-keys": Case("keys", "halo", "zigzag", family="split", kv_heads=4),
    "split-halo-heads": Case("heads", "halo", "contiguous", family="split", context=2),
    "split-heads": Case("heads", "heads", "contiguous", family="split", context=2),
    "window-over-three-ranks": Case("keys", "halo", "contiguous", length=8),
    "window-over-many-segments": Case("keys", "halo", "zigzag", length=8),
}


def received(ranks: distributed.Ranks, cases: list[Case]) -> list[tuple[int, dict[str, int]]]:
    """Each case's context rank, and its bytes of a forward and backward by collective."""
    from benchmarks.group_calls import counted
    from megahybrid.model.row_shards import ContextRanks
    from megahybrid.model.transformer import Transformer

    found = []
    for case in cases:
        mesh = ranks.mesh(case.tensor, case.context)
        exchange = {"full": case.full, "windowed": case.windowed, "layout": case.layout}
        config = model(case.family, kv_heads=case.kv_heads)
        parallel = ParallelConfig.model_validate(
            {"tensor": case.tensor, "context": case.context, "exchange": exchange}
        )
        ours = Transformer(
            config,
            mesh,
            recompute=(case.recompute,) * 2,
            context=ContextRanks(mesh, config, parallel),
        )
        tokens = torch.zeros(ROWS, case.length, dtype=torch.int64)
        with counted() as calls:
            loss, _ = ours(tokens, tokens, None)
            loss.backward()
        group = mesh.context.group
        sizes = {way: n for (name, way), n in calls.received.items() if name == group.group_name}
        found.append((mesh.context.rank, sizes))
    return found


def loss_of_each_token(case: Case) -> int:
    """Bytes of what a forward gathers beside attention: a loss for each token of other ranks."""
    return ROWS * (case.length - case.length // case.context) * WIDTH


@pytest.fixture(scope="module")
def counts() -> dict[str, list[tuple[int, dict[str, int]]]]:
    by_rank = distributed.run(RANKS, received, list(CASES.values()), timeout_seconds=240)
    return {name: [of[index] for of in by_rank] for index, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_every_rank_receives_exactly_what_is_foretold(name: str, counts: dict[str, Any]) -> None:
    case = CASES[name]
    for rank, sizes in counts[name]:
        assert sum(sizes.values()) - loss_of_each_token(case) == case.received(rank), (rank, sizes)


# Of two ranks none lacks a whole window both ways, nor does one of so few tokens.
WHOLE_HALOS = [name for name, case in CASES.items() if case.context > 2 and case.length == LENGTH]


@pytest.mark.parametrize("name", WHOLE_HALOS)
def test_the_busiest_rank_receives_what_the_formula_says(name: str, counts: dict[str, Any]) -> None:
    busiest = max(sum(sizes.values()) for _, sizes in counts[name])
    nominal = CASES[name].nominal()
    assert busiest - loss_of_each_token(CASES[name]) == pytest.approx(nominal, rel=0.01)


def test_a_halo_does_not_grow_with_the_row() -> None:
    """Halos go by all-to-all, the full layer's keys do not: they are told apart by collective."""
    lengths = (LENGTH, 2 * LENGTH, 8 * LENGTH)
    cases = [
        Case("keys", "halo", layout, length=length)
        for layout in ("contiguous", "zigzag")
        for length in lengths
    ]
    for of_rank in distributed.run(RANKS, received, cases, timeout_seconds=240):
        halos = [sizes["all_to_all"] for _, sizes in of_rank]
        assert len(set(halos[:3])) == len(set(halos[3:])) == 1 and min(halos) > 0
        keys = [sizes["all_gather"] for _, sizes in of_rank[:3]]
        assert [size // keys[0] for size in keys] == [1, 2, 8]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("degree", [2, 3, 4, 8])
@pytest.mark.parametrize("window", [1, 2, 7, 24, 25, 60, 144])
def test_what_a_rank_gets_another_gave(layout: Any, degree: int, window: int) -> None:
    length, shape = 144, HeadShape(4, 2, 8)
    traffic = [
        received_bytes("halo", window, length, degree, shape, layout=layout, rank=rank)
        for rank in range(degree)
    ]
    assert sum(each.forward for each in traffic) == sum(each.backward for each in traffic)
    nominal = exchange_bytes(
        *("halo", window, length, degree, shape), segments=segments_per_rank(layout)
    )
    assert max(each.forward for each in traffic) <= nominal.forward
    if layout == "contiguous":  # the last rank has whole windows before it, the first nothing
        assert traffic[0].forward == 0
        before_last = length - length // degree
        share = min(window - 1, before_last) * 2 * 2 * 8 * 2
        assert traffic[-1].forward == share and traffic[-1].backward == 0


@pytest.mark.parametrize("name", CASES)
def test_a_plan_foretells_the_bytes_of_its_layers(name: str) -> None:
    """What `describe` multiplies with rows and layers, from the plan and not from the case."""
    case = CASES[name]
    config = model(case.family, kv_heads=case.kv_heads)
    exchange = {"full": case.full, "windowed": case.windowed, "layout": case.layout}
    parallel = ParallelConfig.model_validate(
        {"tensor": case.tensor, "context": case.context, "exchange": exchange}
    )
    found = plan_context(config, parallel, config.layer_plan, case.length)
    again = case.recompute in ("full", "offload")
    of_layers = [
        found.layer_bytes(layer, WIDTH, forward_again=again) for layer in config.layer_plan.names()
    ]
    assert ROWS * sum(of_layers) == case.nominal()


def test_two_fused_views_cost_the_exchange_of_one() -> None:
    """Keys go once; by token and by heads alone a value for each token and head comes on top."""
    parallel = ParallelConfig.model_validate({"context": 4, "exchange": {"full": "keys"}})
    plain, fused = model("nope").layer_plan, model("fused").layer_plan
    of_fused = plan_context(model("fused"), parallel, fused, LENGTH).layer_bytes("layer1")
    assert of_fused == plan_context(model("nope"), parallel, plain, LENGTH).layer_bytes("layer0")
