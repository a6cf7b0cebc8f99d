"""The self-test over the edges of shards: it passes what is right, and what is not it refuses on
every rank alike."""

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from megahybrid.config.attention import AttentionScheme, Nope
from megahybrid.config.context import Exchange, Layout
from megahybrid.errors import AuditError
from megahybrid.model import core_attention
from megahybrid.model.context_attention import ShardedCall
from megahybrid.model.kernels import attend
from megahybrid.model.kernels.chosen import ChosenKernels
from megahybrid.model.row_shards import RowShards
from megahybrid.model.selftest import HeadShape, run_context_test
from megahybrid.model.selftest.across_ranks import cut_over, short_rows, short_windows
from megahybrid.model.selftest.questions import own_rows
from megahybrid.parallel.mesh import Axis
from megahybrid.train import stage_model
from megahybrid.train.stage_model import StageModel
from tests import distributed
from tests.model import broken_exchanges as broken
from tests.model.test_selftest import DTYPES, SCHEMES, rope
from tests.parity.cases import model
from tests.train.test_synchronisation import LENGTH, run_config

Lies = tuple[Layout, Exchange, Exchange]  # the layout, and what full and windowed layers exchange
LIES: list[Lies] = [
    ("contiguous", "heads", "halo"),
    ("zigzag", "keys", "halo"),
    ("contiguous", "keys", "keys"),
    ("zigzag", "heads", "heads"),
]
WIDE = {
    "wide-window": AttentionScheme(position=rope(theta=50000.0), window=700),
    "wide-nope": AttentionScheme(position=Nope(kind="nope"), window=300),
    "wide-chunk": AttentionScheme(position=rope(theta=50000.0), chunk=700),
}
ALL = SCHEMES | WIDE


def shards_of(axis: Axis, schemes: dict[str, AttentionScheme], lies: Lies) -> RowShards:
    """Rows on an axis as a run's plan would lay them."""
    layout, full, windowed = lies
    exchanges = {
        scheme.reach: full if scheme.reach is None else windowed for scheme in schemes.values()
    }
    return RowShards(axis, layout, 0, tuple(exchanges.items()))


def seconds_of(
    ranks: distributed.Ranks,
    names: list[str],
    lies: Lies,
    dtype: str = "fp32",
    heads: tuple[int, int, int] = (4, 4, 16),
    kernel: str = "auto",
) -> float:
    """The CPU-seconds of a self-test of some schemes as those of one plan."""
    mesh, schemes = ranks.mesh(1, ranks.world_size), {name: ALL[name] for name in names}
    shape = HeadShape(*heads, DTYPES[dtype], torch.device("cpu"))
    began = time.process_time()
    shards = shards_of(mesh.context, schemes, lies)
    report = run_context_test(schemes, shape, dict.fromkeys(schemes, kernel), shards, mesh.world)
    assert [(name, exchange) for name, exchange, _ in report] == [
        (name, shards.exchange(scheme.reach)) for name, scheme in schemes.items()
    ]
    return time.process_time() - began


def several(ranks: distributed.Ranks, cases: list[tuple[Any, ...]]) -> list[float]:
    """`seconds_of` of each case."""
    return [seconds_of(ranks, *case) for case in cases]


# Each position, scaling, scale and norm, and windows shorter and longer than a segment.
ASKED = (
    "rope-window",
    "rope-window-1",
    "nope-window-2",
    "nope",
    "rope-partial",
    "rope-llama3",
    "rope-yarn",
    "nope-llama4",
    "nope-log",
    "nope-ssmax",
    "rope-fixed",
    "layernorm-per_head-1",
    "projection-0",
    "ssmax-1",
    "wide-window",
    "wide-nope",
    "rope-chunk",
    "wide-chunk",
    "nope-chunk-log",
)


def covering() -> list[tuple[Any, ...]]:
    """Each scheme in turn with layout, exchanges, dtype, heads and a kernel."""
    cases = []
    for number, name in enumerate(ASKED):
        heads = [(4, 4, 16), (8, 2, 8), (4, 1, 24)][number % 3]
        kernel = "reference" if number % 7 == 3 else "auto"
        dtype = list(DTYPES)[number // 2 % 3]
        cases.append(([name], LIES[(number + number // 4) % 4], dtype, heads, kernel))
    return cases


def test_every_scheme_passes_over_two_ranks() -> None:
    distributed.run(2, several, covering(), timeout_seconds=300)


def test_a_plan_passes_over_four_ranks() -> None:
    cases = [(["rope-window", "nope-ssmax"], LIES[0]), (["rope-window-prime", "nope"], LIES[1])]
    distributed.run(4, several, cases, timeout_seconds=300)


def test_a_scheme_takes_less_than_two_seconds_of_a_core() -> None:
    cases = [(["rope-window"], LIES[0]), (["nope"], LIES[1])]
    for seconds in distributed.run(2, several, cases):
        assert max(seconds) < 2  # 0.3 s and 0.6 s


def adopted(ranks: distributed.Ranks) -> dict[str, Any]:
    """What a stage's model tests when it is built, when a window changes, and at an audit."""
    config = model("rnope_swa", kv_heads=2)
    run = run_config(config, "fp32", 1)
    parallel = run.parallel.model_copy(update={"context": {LENGTH // 2: 1, LENGTH: 2}})
    stage = run.stages[0].model_copy(update={"lengths": {LENGTH // 2: 1, LENGTH: 1}})
    run = run.model_copy(update={"parallel": parallel, "stages": (stage,)})
    mesh, tested = ranks.mesh(1, 2), []
    kernels = ChosenKernels(device="cpu", full="sdpa", windowed="blocked")
    right = stage_model.run_context_test

    def watched(schemes: Any, *args: Any, passed: Any = (), short: bool = False) -> Any:
        tested.append(([name for name in schemes if name not in passed], args[2].axis.size, short))
        return right(schemes, *args, passed=passed, short=short)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_model, "run_context_test", watched)
        built = StageModel(run, mesh, kernels, lambda *_: None)
        built.build(0, 0)
        local = config.layer_plan.schemes["layer0"].model_copy(update={"window": 6})
        schemes = config.layer_plan.schemes | {"layer0": local}
        annealed = config.layer_plan.model_copy(update={"schemes": schemes})
        built._adopt(annealed)
        built.audit()
        found: dict[str, Any] = {"tested": list(tested)}
        # Of whole rows a rank is wrong alone: the other, which finds nothing, stops as well.
        if ranks.rank == 1:
            patch.setattr(core_attention, "attend", keys_backwards_attend)
        try:
            StageModel(run, mesh, kernels, lambda *_: None).build(0, 0)
        except AuditError as error:
            found["said"] = str(error)
    return found


def keys_backwards_attend(q: Any, k: Any, v: Any, *how: Any) -> Any:
    """Values in the order of the last key first."""
    return attend(q, k, v.flip(0), *how)


def test_a_stage_tests_new_schemes_across_ranks_and_all_at_an_audit() -> None:
    first, second = distributed.run(2, adopted)
    both = ["layer0", "layer1"]
    assert first == second
    assert first["tested"] == [(both, 2, False), (["layer0"], 2, False), (both, 2, True)]
    assert first["said"].startswith("self-test: scheme 'layer0' with kernel blocked on rank 1 ")


FAULTS: dict[str, tuple[str, Lies, broken.Plant]] = {
    "no-halo": ("rope-window", LIES[0], broken.no_halo),
    "no-halo-of-a-wide-window": ("wide-window", LIES[0], broken.no_halo),
    "halo-of-w-2": ("rope-window", LIES[0], broken.short_halo),
    "halo-of-w-2-zigzag": ("nope-window-2", LIES[1], broken.short_halo),
    "halo-of-w-2-of-a-wide-window": ("wide-window", LIES[1], broken.short_halo),
    "halo-of-w": ("rope-window", LIES[1], broken.long_halo),
    "halo-of-w-of-a-wide-window": ("wide-nope", LIES[0], broken.long_halo),
    "aligned-at-the-first-key": ("rope-window", LIES[0], broken.upper_left),
    "keys-aligned-at-the-first-key": ("nope", LIES[1], broken.upper_left),
    "keys-at-local-positions": ("rope-window", LIES[0], broken.local_keys),
    "all-at-local-positions": ("rope-partial", LIES[1], broken.local_positions),
    "local-temperatures": ("nope-ssmax", LIES[0], broken.local_temperatures),
    "halo-gradients-dropped": ("rope-window", LIES[0], broken.halo_gradients_dropped),
    "halo-gradients-dropped-wide": ("wide-window", LIES[1], broken.halo_gradients_dropped),
    "layouts-mixed": ("rope-window", LIES[0], broken.mixed_layouts),
    "layouts-mixed-zigzag": ("rope-window", LIES[1], broken.mixed_layouts),
    "heads-out-of-order": ("nope", LIES[0], broken.heads_out_of_order),
    "zigzag-joined-as-contiguous": ("nope", LIES[1], broken.joined_as_contiguous),
    "zigzag-joined-as-contiguous-heads": ("nope", LIES[3], broken.laid_as_contiguous),
    "gathered-gradients-not-summed": ("nope", LIES[1], broken.gradients_not_summed),
    "documents-of-the-rows-beginning": ("rope-window", LIES[0], broken.first_documents),
    "documents-of-the-rows-beginning-keys": ("rope-window", LIES[2], broken.first_documents),
}


# In bf16, where an error in the numbers is seen last.
COARSE = (
    "halo-of-w-2-of-a-wide-window",
    "halo-of-w-of-a-wide-window",
    "keys-at-local-positions",
    "local-temperatures",
    "halo-gradients-dropped-wide",
    "gathered-gradients-not-summed",
)


def said(ranks: distributed.Ranks, dtype: str, names: tuple[str, ...]) -> dict[str, str]:
    """What the self-test says of each fault on this rank; "" where it finds nothing."""
    found = {}
    for name in names:
        scheme, lies, plant = FAULTS[name]
        with pytest.MonkeyPatch.context() as patch:
            plant(patch)
            try:
                seconds_of(ranks, [scheme], lies, dtype)
                found[name] = ""
            except AuditError as error:
                found[name] = str(error)
    return found


@pytest.mark.parametrize(("dtype", "names"), [("fp32", tuple(FAULTS)), ("bf16", COARSE)])
def test_every_fault_is_refused_on_all_ranks_in_the_same_words(
    dtype: str, names: tuple[str, ...]
) -> None:
    first, second = distributed.run(2, said, dtype, names, timeout_seconds=300)
    assert tuple(first) == names
    assert [name for name, words in first.items() if not words] == []
    assert first == second
    for name, words in first.items():
        scheme, (layout, full, windowed), _ = FAULTS[name]
        exchange = full if ALL[scheme].window is None else windowed
        assert words.startswith(
            f"self-test: scheme '{scheme}' with exchange {exchange} over 2 context ranks "
            f"({layout}) and kernel "
        ), words


def wrong_on_one(ranks: distributed.Ranks, wrong_rank: int) -> str:
    """What is said where the kernel of one rank is wrong."""

    with pytest.MonkeyPatch.context() as patch:
        right = ShardedCall.run
        patch.setattr(ShardedCall, "run", _scaled(right, 1.5 if ranks.rank == wrong_rank else 1))
        try:
            seconds_of(ranks, ["rope-window", "nope-window-2"], LIES[0])
        except AuditError as error:
            return str(error)
    return ""


def _scaled(right: Callable[..., Any], factor: float) -> Callable[..., Any]:
    return lambda self, q, k, v, first, last: right(self, q, k, factor * v, first, last)


@pytest.mark.parametrize("wrong_rank", [0, 1])
def test_one_wrong_rank_is_named_and_stops_all(wrong_rank: int) -> None:
    (words, *others) = distributed.run(2, wrong_on_one, wrong_rank)
    assert others == [words]
    assert f" on rank {wrong_rank} " in words


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("degree", [2, 3, 4, 8, 32])
def test_documents_end_about_every_edge_of_short_rows(layout: Layout, degree: int) -> None:
    axis = Axis("context", degree, 0, None, tuple(range(degree)))
    shards = RowShards(axis, layout, 0, ())
    rows = short_rows(shards)
    real = replace(shards, length=rows.length)
    edges = {start for each in real.of_ranks for start, _ in each} - {0}
    assert set(rows.edges) == edges
    assert all(sum(row) == rows.length for row in rows.documents)
    borders = [set(rows.borders(row)) for row in range(len(rows.documents))]
    for off in (-1, 0, 1):
        assert any(edge + off in of_row for of_row in borders for edge in edges)
    assert any(1 in row for row in rows.documents)
    if len(edges) > 1:  # a document over three shards
        ends = [(0, *sorted(of_row), rows.length) for of_row in borders]
        assert any(
            sum(start < edge < stop for edge in edges) > 1
            for of_row in ends
            for start, stop in pairwise(of_row)
        )
    for window in (1, 2, 64, 4096):
        for short in short_windows(window, shards):
            assert short is not None and short <= min(window, rows.length - rows.edges[-1] + 200)
    far = cut_over(own_rows(4096, "auto"), shards)
    assert far.length % len(edges | {0}) == 0 and far.edges[-1] > 2048
