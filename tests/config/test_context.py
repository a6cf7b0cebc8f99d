"""Context ranks in a run file: degrees by length, exchanges, layouts and their arithmetic."""

from dataclasses import replace
from typing import Any

import pytest

from megahybrid.config import check_run, load
from megahybrid.config.context import (
    HeadShape,
    Layout,
    exchange_bytes,
    legal_exchanges,
    segments,
    work_max_over_mean,
)
from megahybrid.config.context_memory import ContextMemory, context_memory
from megahybrid.config.context_plan import plan_context
from megahybrid.config.memory_estimate import memory_per_rank, policies_of
from megahybrid.config.parallel import ParallelConfig
from megahybrid.errors import ConfigError
from tests.config.example import example
from tests.config.test_config_files import CONFIGS
from tests.parity.cases import model as tiny

LENGTHS = (12, 96, 240)


def test_a_degree_for_each_length() -> None:
    parallel = example("parallel.context={1024: 1, 4096: 4, 8192: 2}").parallel
    degrees = {n: parallel.context_degree(n) for n in (256, 1024, 1025, 4096, 8192, 9999)}
    assert degrees == {256: 1, 1024: 1, 1025: 4, 4096: 4, 8192: 2, 9999: 2}
    assert (parallel.context_axis, parallel.context_degrees) == (4, (1, 2, 4))
    assert parallel.data_degree(32) == 4
    alone = example().parallel
    assert (alone.context_axis, alone.context_degrees, alone.context_degree(7)) == (1, (1,), 1)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("degree", [1, 2, 3, 6])
def test_segments_cover_a_row_once(layout: Layout, degree: int) -> None:
    for length in LENGTHS:
        held = [segments(layout, length, degree, rank) for rank in range(degree)]
        tokens = sorted(t for parts in held for start, stop in parts for t in range(start, stop))
        assert tokens == list(range(length))
        assert {sum(stop - start for start, stop in parts) for parts in held} == {length // degree}


@pytest.mark.parametrize("window", [None, 1, 7, 96])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_work_is_the_scores_that_a_count_finds(layout: Layout, window: int | None) -> None:
    length, degree = 96, 4
    work = [
        sum(
            min(token + 1, window or length)
            for start, stop in segments(layout, length, degree, rank)
            for token in range(start, stop)
        )
        for rank in range(degree)
    ]
    found = work_max_over_mean(layout, "keys", window, length, degree)
    assert found == pytest.approx(max(work) * degree / sum(work))
    assert work_max_over_mean("zigzag", "keys", None, length, degree) == 1.0
    assert work_max_over_mean(layout, "heads", window, length, degree) == 1.0


def test_heads_split_only_with_the_kv_heads_that_they_read() -> None:
    assert HeadShape(12, 4, 8).legal_degrees() == [1, 2, 4, 12]
    assert HeadShape(12, 1, 8).legal_degrees() == [1, 2, 3, 4, 6, 12]
    assert HeadShape(12, 3, 8).legal_degrees() == [1, 3, 6, 12]
    assert HeadShape.of(example().model, 4) == HeadShape(2, 1, 16)
    assert legal_exchanges(64, 256, 8, HeadShape(8, 8, 16)) == ("halo", "heads", "keys")
    assert legal_exchanges(256, 256, 8, HeadShape(8, 8, 16)) == ("heads", "keys")
    assert legal_exchanges(64, 256, 3, HeadShape(8, 8, 16)) == ("halo", "keys")
    assert legal_exchanges(64, 256, 1, HeadShape(8, 8, 16)) == ()


def test_the_bytes_of_an_exchange() -> None:
    """Against the bytes of the shape 8B at 131,072 tokens over 8 ranks, counted by hand."""
    shape, length, degree = HeadShape(32, 8, 128), 131_072, 8
    others = length - length // degree

    halo = exchange_bytes("halo", 4096, length, degree, shape, segments=1)
    assert (halo.forward, halo.backward) == (2 * 4095 * 8 * 128 * 2,) * 2
    assert halo == exchange_bytes("halo", 4096, 8 * length, 4, shape, segments=1)
    assert exchange_bytes("halo", 4096, length, degree, shape, segments=2).total() == 4 * (
        halo.forward
    )
    heads = exchange_bytes("heads", None, length, degree, shape, segments=1)
    # Four query heads arrive and leave, with one KV head of each kind.
    assert heads.forward == heads.backward == others * 128 * 2 * (4 + 4 + 1 + 1)
    keys = exchange_bytes("keys", None, length, degree, shape, segments=1)
    assert (keys.forward, keys.backward) == (2 * others * 8 * 256, 4 * others * 8 * 256)
    assert keys.total(forward_again=True) == keys.total() + keys.forward


@pytest.mark.parametrize(
    "overrides,length,layout,exchanges",
    [
        # 8 heads and 2 KV heads over 8 ranks: 2 (8/8 + 1) for heads, 6 * 2 / 2 for keys.
        (("parallel.context=8",), 4096, "contiguous", ("halo", "heads")),
        (("parallel.context=2",), 4096, "zigzag", ("halo", "keys")),
        # A window as long as the row is none.
        (("parallel.context=8",), 64, "contiguous", ("heads", "heads")),
        (("parallel.context=8", "parallel.exchange.full=keys"), 4096, "zigzag", ("halo", "keys")),
        (
            ("parallel.context=2", "parallel.exchange.layout=contiguous"),
            4096,
            "contiguous",
            ("halo", "keys"),
        ),
        (
            ("parallel.context=8", "parallel.exchange.windowed=keys"),
            4096,
            "contiguous",
            ("keys", "heads"),
        ),
        (("parallel.context={64: 1, 4096: 8}",), 64, "contiguous", (None, None)),
    ],
)
def test_each_scheme_gets_the_legal_exchange_of_the_fewest_bytes(
    overrides: tuple[str, ...], length: int, layout: str, exchanges: tuple[str | None, ...]
) -> None:
    run = example("parallel.tensor=1", *overrides)
    found = plan_context(run.model, run.parallel, run.model.layer_plan, length)
    assert (found.layout, tuple(dict(found.exchanges).values())) == (layout, exchanges)
    assert found.exchange("local") == exchanges[0]


def test_an_exchange_that_heads_cannot_serve_is_refused() -> None:
    run = example("parallel.context=3", "parallel.exchange={full: heads, windowed: heads}")
    with pytest.raises(ConfigError) as refused:
        plan_context(run.model, run.parallel, run.model.layer_plan, 4096)
    assert str(refused.value).splitlines() == [
        "parallel.exchange.full=heads cannot split a tensor rank's 4 heads (KV heads: 1) over 3 "
        "context ranks (parallel.context at length 4096). Use 1, 2 or 4 context ranks, or keys.",
        "parallel.exchange.windowed=heads cannot split a tensor rank's 4 heads (KV heads: 1) "
        "over 3 context ranks (parallel.context at length 4096). Use 1, 2 or 4 context ranks, or "
        "halo.",
    ]


REFUSED: list[tuple[list[str], int | None, str]] = [
    (["parallel.context=0"], None, "parallel.context=0 must be at least 1. Change it."),
    (
        ["parallel.context={}"],
        None,
        "parallel.context={} names no length. Use one degree, or {length: degree}.",
    ),
    (
        ["parallel.context=two"],
        None,
        "parallel.context=two is not an integer (it is text). Write an integer.",
    ),
    (
        ["parallel.context={256: 3, 4096: 4}"],
        None,
        "parallel.context names a degree of 3, which does not divide the context axis of 4 ranks "
        "(the largest degree). Use 1, 2 or 4.",
    ),
    (
        ["parallel.exchange.full=halo"],
        None,
        "parallel.exchange.full=halo is not one of auto, heads, keys.",
    ),
    (
        ["parallel.context=1_000_000"],
        None,
        "parallel.context=1000000 is more than 65,536 (every degree that divides it is tried). "
        "Use less.",
    ),
    (
        ["parallel.context=4"],
        12,
        "parallel.tensor=2 times 4 context ranks (parallel.context) does not divide the world size "
        "of 12 ranks. Use 1, 2 or 3 context ranks, or start a multiple of 8 ranks.",
    ),
    (
        ["parallel.context=2"],
        16,
        "stages.0.batch_tokens=8192 is not a multiple of 16384 (4 data ranks times "
        "stages.0.micro_batch_tokens=4096). Use 16384.",
    ),
    (
        ["parallel.context=2", "parallel.zero_stage=0", "parallel.tensor=1"],
        None,
        "parallel.zero_stage=0 does not sum gradients over the 2 context ranks "
        "(parallel.context). Use zero_stage: 1.",
    ),
    (
        ["parallel.context={256: 512, 4096: 1}"],
        None,
        "stages.0.lengths names 256, fewer tokens than its 512 context ranks (parallel.context). "
        "Use 256 context ranks or fewer.",
    ),
    (
        ["parallel.context=3"],
        None,
        "stages.0.lengths names 256, which is not a multiple of 12 (2 zigzag segments on each of 3 "
        "context ranks times parallel.tensor=2). Use 252 or 264.",
    ),
    (
        ["parallel.context=3", "parallel.exchange.layout=contiguous", "parallel.tensor=1"],
        None,
        "stages.0.lengths names 256, which is not a multiple of 3 (3 context ranks). "
        "Use 255 or 258.",
    ),
    (
        ["parallel.context=4", "stages.0.lengths={264: 1}"],
        None,
        "stages.0.lengths names 264, which is not a multiple of 16 (2 zigzag segments on each of 4 "
        "context ranks times parallel.tensor=2). Use 256 or 272. Or set "
        "parallel.exchange.layout: contiguous.",
    ),
    (
        ["parallel.context={1024: 1, 4096: 8}"],
        None,
        "stages.1.micro_batch_tokens=4096 is not a multiple of 8192: at length 1024 each of 8 "
        "groups of 1 among 8 context ranks (parallel.context) takes whole rows. Use 8192.",
    ),
    (
        ["parallel.context=2", "device=cuda", "kernels.full=cudnn"],
        None,
        "kernels.full=cudnn does not serve fewer queries than keys, as 2 context ranks have them "
        "(exchange keys at length 256). Use auto, reference, sdpa, varlen, flex, fa3 or fa4, or "
        "parallel.exchange.full: heads.",
    ),
    (
        [
            "parallel.context=8",
            "parallel.tensor=1",
            "device=cuda",
            "kernels.windowed=cudnn_frontend",
        ],
        None,
        "kernels.windowed=cudnn_frontend does not serve fewer queries than keys, as 8 context "
        "ranks have them (exchange halo at length 256). Use auto, reference, blocked, varlen, "
        "flex, fa3 or fa4, or "
        "parallel.exchange.windowed: heads.",
    ),
]


@pytest.mark.parametrize(
    "overrides,world_size,line", REFUSED, ids=[" ".join(o) for o, _, _ in REFUSED]
)
def test_what_context_ranks_cannot_do_is_one_line(
    overrides: list[str], world_size: int | None, line: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        check_run(example(*overrides), world_size)
    assert line in str(refused.value).splitlines()


@pytest.mark.parametrize(
    "overrides,world_size",
    [
        (["parallel.context=2"], 8),
        (["parallel.context={256: 1, 4096: 4}"], 16),
        # Heads gives whole rows, which every kernel serves.
        (["parallel.context=2", "parallel.exchange={full: heads, windowed: heads}"], 8),
        (["parallel.context=2", "parallel.zero_stage=3"], None),
    ],
)
def test_a_run_on_context_ranks_passes(overrides: list[str], world_size: int | None) -> None:
    check_run(example(*overrides), world_size)


def test_memory_of_context_ranks_is_that_of_their_tokens() -> None:
    """Without the exchange's own, exactly the memory of a C-th of the tokens, with states cut over
    data times context ranks."""
    run = example("parallel.context=4", "parallel.zero_stage=3")
    context = context_memory(run, 1)
    fewer = run.stages[1].model_copy(update={"micro_batch_tokens": 1024})
    where: dict[str, Any] = {"tensor": 2, "zero_stage": 3, "precision": "fp32"}
    found = memory_per_rank(run.model, run.stages[1], data_degree=2, context=context, **where)
    plain = memory_per_rank(run.model, fewer, data_degree=8, **where)
    assert (found.weights, found.gradients) == (plain.weights, plain.gradients)
    assert found.optimizer == plain.optimizer
    assert found.activations == plain.activations + sum(context.kept)
    # The loss needs more than one layer's backward with its exchange.
    assert found.working == plain.working
    large = replace(context, working=2**30)
    found = memory_per_rank(run.model, run.stages[1], data_degree=2, context=large, **where)
    assert 0 < found.working - 2**30 < plain.working


def test_the_memory_of_an_exchange() -> None:
    # 4 heads and 1 KV head of 16 a tensor rank; 63 tokens before each of two segments. The longest
    # length needs most of keys, and every row of 1024 tokens has a halo of its own.
    context = context_memory(example("parallel.context=4"), 1)
    halo = 2 * 63 * 2 * 16 * 4
    assert context.kept == (4 * halo, 4 * halo, 4 * halo, 0) * 2
    assert context.working == 4 * 4096 * 16 * 4
    assert context_memory(example(), 1) == ContextMemory(1, (), 0)
    # Rows of 256 tokens, one on each context rank: nothing crosses, but the axis is there.
    alone = context_memory(example("parallel.context={256: 1, 4096: 4}"), 0)
    assert (alone.axis, sum(alone.kept), alone.working) == (4, 0, 0)


def test_a_budget_counts_the_context_ranks() -> None:
    def policies(context: int) -> set[str]:
        run = load(
            CONFIGS / "runs/paper_rnope_swa_8b.yaml",
            ["stages.1.recompute={budget_gib: 40}", f"parallel.context={context}"],
        )
        return set(policies_of(run, 1, 16 // context))

    assert "none" in policies(4) and policies(1) != policies(4)


def test_the_kernels_named_here_are_those_that_say_so_themselves() -> None:
    from megahybrid.config.context_check import FEWER_QUERIES
    from megahybrid.model.kernels.registry import TABLE

    for kind, asked in (("full", {"before"}), ("windowed", {"before", "window"})):
        serving = {kernel.name for kernel in TABLE if asked <= kernel.serves}
        named = set(FEWER_QUERIES[kind]) - {"auto"}
        # blocked without a window is sdpa: nobody names it for a full layer.
        assert named == serving - ({"blocked"} if kind == "full" else set())


def test_views_have_the_exchange_of_one_and_split_heads_two() -> None:
    """Of four heads on two KV heads, half are near: four ranks cannot share two heads."""
    config = tiny("split")  # then a layer whose views are fused

    def planned(context: int, full: str = "auto") -> str:
        parallel = ParallelConfig.model_validate({"context": context, "exchange": {"full": full}})
        return plan_context(config, parallel, config.layer_plan, 96).in_words()

    assert planned(2) == (
        "96 tokens over 2 context ranks (zigzag): layer0 (near) halo, layer0 (far) keys, "
        "layer1 heads"
    )
    assert planned(2, "heads") == (
        "96 tokens over 2 context ranks (contiguous): layer0 (near) halo, layer0 (far) heads, "
        "layer1 heads"
    )
    with pytest.raises(ConfigError) as raised:
        planned(4, "heads")
    assert str(raised.value) == (
        "parallel.exchange.full=heads cannot split a tensor rank's 2 heads of scheme layer0 (far) "
        "(KV heads: 1) over 4 context ranks (parallel.context at length 96). Use 1 or 2 context "
        "ranks, or keys."
    )
