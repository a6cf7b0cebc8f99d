import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megahybrid.data.batches import make_batch
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.loader import StepShape, read_step
from megahybrid.data.mixture import (
    Exhausted,
    Mixture,
    RowPlan,
    State,
    choose_sources,
    cursor_crc,
)
from megahybrid.errors import DataError, NoProgressError
from tests.data.corpus import all_tokens, write_corpus

NAMES = ("books", "code", "web")


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenDataset]:
    folder = tmp_path_factory.mktemp("sources")
    draw = np.random.default_rng(0)
    return {
        name: write_corpus(
            folder / name, draw.integers(1, 60, count).tolist(), seed=count, shard_tokens=500
        )
        for name, count in zip(NAMES, (3, 20, 100), strict=True)
    }


def mixture(datasets: dict[str, TokenDataset], **weights: float) -> Mixture:
    return Mixture(datasets, weights or {"web": 1}, seed=3, block_tokens=64, lanes=4)


weights = st.dictionaries(st.sampled_from(NAMES), st.floats(0.01, 1), min_size=1)
stages = st.lists(
    st.tuples(weights, st.lists(st.tuples(st.integers(1, 64), st.integers(1, 12)), max_size=5)),
    min_size=1,
    max_size=4,
)


@given(stages, st.data())
def test_order_survives_resumes_and_reweightings_and_loses_nothing(
    datasets: dict[str, TokenDataset],
    stages: list[tuple[dict[str, float], list[tuple[int, int]]]],
    data: st.DataObject,
) -> None:
    """Every token's origin over random stages; a second run stops and resumes at random."""
    runs = mixture(datasets)
    state = resumed = runs.start()
    origins: dict[str, np.ndarray] = {
        name: np.zeros(dataset.tokens, int) for name, dataset in datasets.items()
    }
    for stage_weights, steps in stages:
        state = runs.reweight(state, stage_weights)
        resumed = runs.reweight(resumed, stage_weights)
        for length, rows in steps:
            plans, state = runs.plan_step(state, length, rows)
            if data.draw(st.booleans()):
                runs = mixture(datasets)
                resumed = runs.restore(json.loads(json.dumps(resumed)))
            same, resumed = runs.plan_step(resumed, length, rows)
            assert same == plans and cursor_crc(resumed) == cursor_crc(state)
            for plan in plans:
                assert plan.source in stage_weights
                assert sum(size for _, size in plan.spans) == length
                for start, size in plan.spans:
                    origins[plan.source][start : start + size] += 1
    for name, source in state["sources"].items():
        order = runs.order(name)
        expected = np.zeros(datasets[name].tokens, int)
        for lane, (n, offset) in enumerate(source["cursor"]):
            for block in range(lane, n, order.lanes):
                start, size = order.block_span(block)
                expected[start : start + size] += 1
            start, _ = order.block_span(n)
            expected[start : start + offset] += 1
        assert origins[name].tolist() == expected.tolist()
        assert source["tokens"] == expected.sum()


@given(
    st.lists(st.floats(0.001, 1), min_size=1, max_size=6),
    st.lists(st.tuples(st.sampled_from([1, 2, 8, 64]), st.integers(1, 40)), max_size=20),
)
def test_mixture_error_stays_below_the_longest_row(
    shares: list[float], steps: list[tuple[int, int]]
) -> None:
    names = [f"s{index}" for index in range(len(shares))]
    total_share = sum(shares)
    state: State = {
        "weights": dict(zip(names, shares, strict=True)),
        "since": dict.fromkeys(names, 0),
        "longest": 0,
    }
    for length, rows in steps:
        for _ in range(rows):  # so that every prefix is seen
            _, since, longest = choose_sources(state, state["weights"], length, 1)
            state = state | {"since": since, "longest": longest}
            total = sum(since.values())
            for name, share in state["weights"].items():
                assert abs(since[name] - share / total_share * total) < longest


@given(st.integers(1, 30), st.integers(1, 30))
def test_step_of_many_rows_chooses_as_single_rows_do(rows: int, more: int) -> None:
    start: State = {"weights": {"a": 0.7, "b": 0.2, "c": 0.1}, "since": {}, "longest": 0}
    start["since"] = dict.fromkeys("abc", 0)
    at_once, since, longest = choose_sources(start, start["weights"], 8, rows)
    rest, _, _ = choose_sources(
        start | {"since": since, "longest": longest}, start["weights"], 8, more
    )
    assert [*at_once, *rest] == list(choose_sources(start, start["weights"], 8, rows + more)[0])


@given(st.integers(1, 24), st.integers(1, 64), st.integers(0, 40))
def test_rows_do_not_depend_on_the_data_degree(
    datasets: dict[str, TokenDataset], rows: int, length: int, before: int
) -> None:
    runs = mixture(datasets, web=0.6, code=0.3, books=0.1)
    _, state = runs.plan_step(runs.start(), 7, before) if before else ([], runs.start())
    alone = read_step(runs, state, StepShape(length, rows, rows)).micro_batches[0]
    for degree in (d for d in range(1, rows + 1) if rows % d == 0):
        for micro_rows in (m for m in range(1, rows // degree + 1) if rows // degree % m == 0):
            tokens = np.zeros_like(alone.tokens)
            targets = np.zeros_like(alone.targets)
            for rank in range(degree):
                shape = StepShape(length, rows, micro_rows)
                step = read_step(runs, state, shape, rank=rank, world_size=degree)
                parts = step.micro_batches
                tokens[rank::degree] = np.concatenate([part.tokens for part in parts])
                targets[rank::degree] = np.concatenate([part.targets for part in parts])
            assert (tokens == alone.tokens).all() and (targets == alone.targets).all()


def test_rows_that_do_not_divide_among_ranks_are_refused(datasets: dict[str, TokenDataset]) -> None:
    runs = mixture(datasets)
    with pytest.raises(DataError, match="6 rows of a step do not divide into micro batches of 2"):
        read_step(runs, runs.start(), StepShape(8, 6, 2), world_size=2)


def plain_batch(
    dataset: TokenDataset, plan: RowPlan, masked: bool
) -> tuple[list[int], list[int], list[int]]:
    """A row written out one token at a time."""
    disk = all_tokens(dataset)
    places = [(start + i, i + 1 == size) for start, size in plan.spans for i in range(size)]
    tokens, targets, starts, first = [], [], [], 0
    for index, (place, span_ends) in enumerate(places):
        tokens.append(int(disk[place]))
        starts.append(first)
        at_join = span_ends and index + 1 < len(places)
        is_eod = disk[place] == dataset.eod_id
        counts = not (is_eod or at_join or place + 1 == len(disk))
        targets.append(int(disk[place + 1]) if counts else -100)
        if at_join or (is_eod and masked):
            first = index + 1
    return tokens, targets, starts


@pytest.mark.parametrize("documents", ["masked", "joined"])
@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 6)), max_size=5))
def test_batches_are_those_written_out_token_by_token(
    datasets: dict[str, TokenDataset], documents: str, steps: list[tuple[int, int]]
) -> None:
    runs = mixture(datasets, web=0.6, code=0.3, books=0.1)
    state = runs.start()
    for length, rows in steps:
        plans, state = runs.plan_step(state, length, rows)
        batch = make_batch(datasets, plans, length, documents)
        for row, plan in enumerate(plans):
            tokens, targets, starts = plain_batch(
                datasets[plan.source], plan, documents == "masked"
            )
            assert batch.tokens[row].tolist() == tokens
            assert batch.targets[row].tolist() == targets
            assert batch.starts[row].tolist() == starts
        assert {batch.tokens.dtype, batch.targets.dtype, batch.starts.dtype} == {np.dtype("int64")}


@pytest.mark.parametrize("vocab_size", [60_000, 100_000])
def test_batch_becomes_tensors_of_the_same_values(tmp_path: Path, vocab_size: int) -> None:
    dataset = write_corpus(tmp_path, [60, 7, 200], vocab_size=vocab_size)
    runs = Mixture({"web": dataset}, {"web": 1}, seed=3, block_tokens=64, lanes=4)
    batch = read_step(runs, runs.start(), StepShape(16, 8, 8)).micro_batches[0]
    assert batch.tokens.max() > 2**15
    tensors = batch.tensors()
    for ours, theirs in zip(tensors, (batch.tokens, batch.targets, batch.starts), strict=True):
        assert (ours.numpy() == theirs).all() and str(ours.dtype) == "torch.int64"
        assert ours.is_contiguous()


@pytest.mark.parametrize("vocab_size", [60_000, 100_000])
def test_id_beyond_the_vocabulary_is_named_by_the_batch(tmp_path: Path, vocab_size: int) -> None:
    dataset = write_corpus(tmp_path, [60, 7, 200], vocab_size=vocab_size)
    raw = np.memmap(tmp_path / "shard-00000.bin", dataset.dtype, mode="r+")
    raw[100] = -1 if vocab_size > 2**16 else 65_535
    raw.flush()
    plans = [RowPlan("web", ((0, 64),)), RowPlan("web", ((64, 64),))]
    with pytest.raises(DataError, match="token id (-1|65535) at token 100, not below vocab_size="):
        make_batch({"web": dataset}, plans, 64)
    make_batch({"web": dataset}, plans[:1], 64)


def test_dropped_source_goes_on_where_it_was(datasets: dict[str, TokenDataset]) -> None:
    runs = mixture(datasets, web=1, code=1)
    _, first = runs.plan_step(runs.start(), 16, 20)
    _, without = runs.plan_step(runs.reweight(first, {"web": 1}), 16, 5)
    assert without["sources"]["code"] == first["sources"]["code"]
    again = runs.reweight(without, {"web": 1, "code": 2, "books": 1})
    assert again["sources"]["code"] == first["sources"]["code"]
    assert again["since"] == {"books": 0, "code": 0, "web": 0}
    assert runs.reweight(again, {"code": 2, "books": 1, "web": 1}) is again


def test_counts_say_how_much_of_each_source_was_served(datasets: dict[str, TokenDataset]) -> None:
    runs = mixture(datasets, web=3, code=1)
    _, state = runs.plan_step(runs.start(), 10, 8)
    assert runs.source_tokens(state) == {"web": 60, "code": 20}
    assert runs.epochs(state)["code"] == 20 / datasets["code"].tokens


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda d: mixture(d, wib=1), "weights names 'wib', which data.sources does not define"),
        (lambda d: mixture(d, web=-1), "weights.web=-1 is not 0 or more"),
        (lambda d: mixture(d, web=0), "weights gives no source more than 0"),
        (
            lambda d: mixture(d).plan_step(mixture(d).start(), 65, 1),
            r"data.block_tokens=64 is smaller than the stage's length \(65\)",
        ),
        (
            lambda d: mixture(d).restore(mixture(d).start() | {"lanes": 8}),
            "data.lanes=4 is not what the run's order was made with \\(8\\)",
        ),
        (lambda d: mixture(d).restore({}), "the saved data state is not one of this version"),
        (
            lambda d: mixture({"web": d["code"]}).restore(mixture(d).start()),
            "data.sources.web at .* has manifest \\w+, not \\w+ as when the run began",
        ),
        (
            lambda d: mixture({"code": d["code"]}, code=1).restore(mixture(d).start()),
            "data.sources lacks 'web', which the run is reading",
        ),
    ],
)
def test_what_cannot_be_mixed_is_refused(
    datasets: dict[str, TokenDataset], make: Callable[..., object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        make(datasets)


once = st.sampled_from(["stop", "renormalise"])


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(1, 30)), min_size=1, max_size=30),
    once,
    st.data(),
)
def test_source_that_may_not_repeat_is_served_once_and_the_others_share_its_part(
    datasets: dict[str, TokenDataset],
    steps: list[tuple[int, int]],
    exhausted: Exhausted,
    data: st.DataObject,
) -> None:
    def new() -> Mixture:
        shares = {"web": 0.5, "code": 0.4, "books": 0.1}
        return Mixture(datasets, shares, seed=3, block_tokens=64, lanes=4, exhausted=exhausted)

    runs, origins = new(), {n: np.zeros(d.tokens, int) for n, d in datasets.items()}
    state = runs.start()
    for length, rows in steps:
        if data.draw(st.booleans()):
            runs = new()
            state = runs.restore(json.loads(json.dumps(state)))
        left = {n: d.tokens - state["sources"][n]["tokens"] for n, d in datasets.items()}
        try:
            plans, after = runs.plan_step(state, length, rows)
        except NoProgressError as error:
            gone = state["gone"]
            short = [n for n in datasets if n in gone or left[n] < length * rows]
            assert "exhausted" in str(error)
            assert len(short) == 3 if exhausted == "renormalise" else short
            return
        singly, one_by_one = [], state
        for _ in range(rows):
            plan, one_by_one = runs.plan_step(one_by_one, length, 1)
            singly += plan
        assert singly == plans and cursor_crc(one_by_one) == cursor_crc(after)
        for plan in plans:
            assert sum(size for _, size in plan.spans) == length
            for start, size in plan.spans:
                origins[plan.source][start : start + size] += 1
        assert all(counts.max() <= 1 for counts in origins.values())
        new_gone = set(after["gone"]) - set(state["gone"])
        assert new_gone <= set(runs.exhaustions(state, after))
        for name in new_gone:
            assert datasets[name].tokens - after["sources"][name]["tokens"] < length
        state = after


def test_exhausted_source_says_so(datasets: dict[str, TokenDataset]) -> None:
    def runs(exhausted: Exhausted) -> Mixture:
        return Mixture(
            datasets, {"books": 1, "web": 1}, seed=3, block_tokens=64, lanes=4, exhausted=exhausted
        )

    rows = datasets["books"].tokens // 8 + 1
    with pytest.raises(NoProgressError, match=r"data.sources.books is exhausted \(\d+ of its"):
        runs("stop").plan_step(runs("stop").start(), 8, 2 * rows + 1)
    mixed = runs("renormalise")
    plans, state = mixed.plan_step(mixed.start(), 8, 2 * rows + 5)
    assert [plan.source for plan in plans[-4:]] == ["web"] * 4
    assert state["gone"] == ["books"] == list(mixed.exhaustions(mixed.start(), state))
    # New weights ask again, and find it as empty as before.
    again = mixed.reweight(state, {"books": 3, "web": 1})
    plans, again = mixed.plan_step(again, 8, 4)
    assert {plan.source for plan in plans} == {"web"} and again["gone"] == ["books"]
    repeated = runs("repeat")
    _, state = repeated.plan_step(repeated.start(), 8, 2 * rows + 5)
    assert set(repeated.exhaustions(repeated.start(), state)) == {"books"}
    with pytest.raises(DataError, match="data.exhausted=stop is not what the run's order was made"):
        runs("stop").restore(state)


def test_state_is_small_and_unchanged_by_planning(datasets: dict[str, TokenDataset]) -> None:
    runs = mixture(datasets)
    state = runs.start()
    before = json.dumps(state)
    runs.plan_step(state, 16, 4)
    assert json.dumps(state) == before and len(before) < 1000


def test_folder_is_opened_by_path(tmp_path: Path) -> None:
    write_corpus(tmp_path, [20])
    assert TokenDataset(str(tmp_path)).tokens == 20
