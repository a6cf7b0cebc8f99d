"""A source with a plan for each length: its order and cursors, what it counts, what is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megahybrid.data.batches import make_batch
from megahybrid.data.counted import counted_targets
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.length_plans import open_plans
from megahybrid.data.loader import StepShape, read_step
from megahybrid.data.mixture import Exhausted, Mixture, State, cursor_crc
from megahybrid.data.order import Permutation
from megahybrid.data_prep.pack import pack
from megahybrid.errors import DataError, ExhaustedError, NoProgressError
from tests.data.corpus import tokenizer_info, write_corpus
from tests.data.masked import write_chats

SEED = 3
SHORT, LONG = 32, 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats in plans for two lengths, the long ones in the second alone; and plain text."""
    folder = tmp_path_factory.mktemp("plans")
    draw = np.random.default_rng(1)
    lengths = [*draw.integers(5, SHORT, 120), *draw.integers(SHORT + 1, LONG, 40)]
    write_chats(folder / "chats", draw.permutation(lengths).tolist(), tokenizer_info())
    write_corpus(folder / "web", draw.integers(2, 60, 200).tolist(), shard_tokens=2000)
    pack(folder / "chats", folder / "short", SHORT, max_document_tokens=SHORT)
    pack(folder / "chats", folder / "long", LONG, min_document_tokens=SHORT + 1)
    return folder


def mixture(folder: Path, exhausted: Exhausted = "repeat", **weights: float) -> Mixture:
    paths = {SHORT: str(folder / "short"), LONG: str(folder / "long")}
    chats, plans = open_plans("chats", paths)
    return Mixture(
        {"chats": chats, "web": TokenDataset(folder / "web")},
        weights or {"chats": 1},
        seed=SEED,
        block_tokens=256,
        lanes=4,
        exhausted=exhausted,
        plans={"chats": plans},
    )


def rows_by_hand(folder: Path, name: str, length: int, first: int, count: int) -> list[Any]:
    """Rows `first` … of one plan, straight from its three files."""
    row_ends = np.fromfile(folder / name / "rows.i64", "<i8")
    starts = np.fromfile(folder / name / "starts.i64", "<i8")
    sizes = np.fromfile(folder / name / "lengths.i32", "<i4")
    rows = len(row_ends) - 1
    found = []
    for n in range(first, first + count):
        row = Permutation(rows, SEED, f"chats.plans.{length}", n // rows)(n % rows)
        entries = range(row_ends[row], row_ends[row + 1])
        found.append(tuple((int(starts[i]), int(sizes[i])) for i in entries))
    return found


# Three short steps for each long one, by sequences; more than an epoch of both.
STEPS = [(SHORT, 8), (SHORT, 8), (SHORT, 8), (LONG, 8)] * 6


def test_each_length_has_rows_and_a_cursor_of_its_own(folder: Path) -> None:
    """Against the plans' files read by hand; a second run is saved and resumed at every step."""
    runs = mixture(folder)
    state = resumed = runs.start()
    assert state["sources"]["chats"]["cursor"] == {}
    taken = {SHORT: 0, LONG: 0}
    for length, rows in STEPS:
        plans, state = runs.plan_step(state, length, rows)
        name = "short" if length == SHORT else "long"
        expected = rows_by_hand(folder, name, length, taken[length], rows)
        assert [plan.spans for plan in plans] == expected
        taken[length] += rows
        cursor = {str(n): [[count, 0]] for n, count in taken.items() if count}
        assert state["sources"]["chats"]["cursor"] == cursor
        again = mixture(folder)
        same, resumed = again.plan_step(
            again.restore(json.loads(json.dumps(resumed))), length, rows
        )
        assert same == plans and resumed == state and cursor_crc(resumed) == cursor_crc(state)
    served = {plan.length: plan.rows for plan in (p.info for p in runs.plans["chats"].values())}
    assert min(taken[n] / served[n] for n in served) > 1, "more than once, or it says little"
    assert runs.epochs(state) == {f"chats.plans.{n}": taken[n] / served[n] for n in served}
    assert runs.source_tokens(state) == {"chats": sum(n * count for n, count in taken.items())}


def test_every_conversation_of_a_plan_is_whole_and_once_an_epoch(folder: Path) -> None:
    runs = mixture(folder)
    state, seen = runs.start(), []
    for length, plan in runs.plans["chats"].items():
        plans, state = runs.plan_step(state, length, plan.info.rows)
        seen += [span for plan in plans for span in plan.spans]
    assert sorted(seen) == sorted(runs.datasets["chats"].document_spans())


def test_weights_stay_by_tokens_over_lengths_and_reweightings(folder: Path) -> None:
    runs = mixture(folder, chats=3, web=1)
    state = runs.start()
    for shares in ({"chats": 3, "web": 1}, {"chats": 1, "web": 1}, {"web": 1}, {"chats": 1}):
        state = runs.reweight(state, shares)
        before, cursor = runs.source_tokens(state), state["sources"].get("chats")
        for length, rows in STEPS[:8]:
            _, state = runs.plan_step(state, length, rows)
            had = {n: count - before.get(n, 0) for n, count in runs.source_tokens(state).items()}
            for name, share in shares.items():
                wanted = share / sum(shares.values()) * sum(had.values())
                assert abs(had[name] - wanted) < LONG
        if "chats" not in shares:
            assert state["sources"]["chats"] == cursor


def test_length_that_comes_later_changes_no_earlier_state(folder: Path) -> None:
    both, alone = mixture(folder), mixture(folder)
    alone.plans["chats"] = {SHORT: alone.plans["chats"][SHORT]}
    first, second = both.start(), alone.start()
    for _ in range(3):
        plans, first = both.plan_step(first, SHORT, 8)
        same, second = alone.plan_step(second, SHORT, 8)
        assert same == plans and second == first
    assert both.plan_step(both.restore(second), LONG, 2) == both.plan_step(first, LONG, 2)
    with pytest.raises(DataError, match=r"chats.plans has none for the stage's 128 \(32\)"):
        alone.plan_step(second, LONG, 2)
    _, first = both.plan_step(first, LONG, 2)
    with pytest.raises(DataError, match="data.sources.chats.plans lacks '128', of which the run"):
        alone.restore(first)


sizes = st.lists(st.integers(2, 90), min_size=4, max_size=30)


@settings(max_examples=25, deadline=None)
@given(sizes, st.integers(1, 3), st.integers(1, 60), st.booleans())
def test_counted_targets_are_those_of_the_batches(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], every: int, length: int, web: bool
) -> None:
    """Over blocks with joins, packed rows with filling and cuts, and documents without a mask."""
    folder = tmp_path_factory.mktemp("counted")
    dataset = write_chats(folder / "data", lengths, tokenizer_info(), every=every)
    if not web:
        pack(folder / "data", folder / "plan", length)
        dataset = TokenDataset(folder / "plan")
    runs = Mixture({"a": dataset}, {"a": 1}, seed=1, block_tokens=64, lanes=2)
    state, counted = runs.start(), 0
    for rows in (3, 5):
        plans, state = runs.plan_step(state, length, rows)
        counted += int((make_batch({"a": dataset}, plans, length).targets >= 0).sum())
        assert runs.source_targets(state) == ({"a": counted} if dataset.masked else {})


def test_ranks_read_the_rows_of_one_and_count_the_same(folder: Path) -> None:
    runs = mixture(folder, chats=3, web=1)
    state = runs.start()
    for length, rows in STEPS[:5]:
        shape = StepShape(length, rows, 2)
        alone = read_step(runs, state, StepShape(length, rows, rows))
        parts = [read_step(mixture(folder), state, shape, rank=r, world_size=4) for r in range(4)]
        targets = np.zeros_like(alone.micro_batches[0].targets)
        for rank, part in enumerate(parts):
            assert part.state == alone.state and part.cursor_crc == alone.cursor_crc
            targets[rank::4] = np.concatenate([batch.targets for batch in part.micro_batches])
        assert (targets == alone.micro_batches[0].targets).all()
        of_chats = [plan.source == "chats" for plan in alone.plans]
        counted = int((targets[of_chats] >= 0).sum())
        before = runs.source_targets(state).get("chats", 0)
        assert alone.source_targets == {"chats": before + counted}
        state = alone.state


def test_state_of_an_older_version_goes_on_and_counts_nothing(folder: Path) -> None:
    """A masked source whose checkpoint has no count: a count from the middle on would mislead."""
    chats = TokenDataset(folder / "chats")
    runs = Mixture({"chats": chats}, {"chats": 1}, seed=1, block_tokens=64, lanes=2)
    state = runs.start()
    del state["sources"]["chats"]["targets"]
    _, old = runs.plan_step(runs.restore(state), 16, 4)
    _, new = runs.plan_step(runs.start(), 16, 4)
    assert runs.source_targets(old) == {} and cursor_crc(old) == cursor_crc(new)
    assert runs.source_targets(new)["chats"] > 0


@pytest.mark.parametrize("exhausted", ["stop", "renormalise"])
def test_plan_that_ends_ends_its_source(folder: Path, exhausted: Exhausted) -> None:
    runs = mixture(folder, exhausted, chats=1, web=1)
    rows = runs.plans["chats"][LONG].info.rows
    _, state = runs.plan_step(runs.start(), SHORT, 4)
    if exhausted == "stop":
        with pytest.raises(
            ExhaustedError,
            match=rf"data.sources.chats is exhausted \(all {rows} rows of its plan for 128 served;",
        ):
            runs.plan_step(state, LONG, 2 * rows + 2)
        return
    plans, after = runs.plan_step(state, LONG, 2 * rows + 2)
    assert sum(plan.source == "chats" for plan in plans) == rows and after["gone"] == ["chats"]
    assert "chats.plans.128" in runs.exhaustions(state, after)
    plans, _ = runs.plan_step(after, SHORT, 4)
    assert {plan.source for plan in plans} == {"web"}
    with pytest.raises(NoProgressError, match="every source of the stage is exhausted"):
        runs.plan_step(runs.reweight(after, {"chats": 1}), LONG, 1)


def test_second_time_through_a_plan_is_told_once(folder: Path) -> None:
    runs = mixture(folder)
    rows = runs.plans["chats"][SHORT].info.rows
    _, first = runs.plan_step(runs.start(), SHORT, rows - 1)
    _, second = runs.plan_step(first, SHORT, 2)
    assert runs.exhaustions(first, second) == {f"chats.plans.{SHORT}": (rows + 1) / rows}
    _, third = runs.plan_step(second, LONG, 1)
    assert runs.exhaustions(second, third) == {}


def branch(runs: Mixture, state: State) -> State:
    return runs.carried(json.loads(json.dumps(state)))


def test_branch_takes_the_cursors_of_the_plans_that_are_the_same(folder: Path) -> None:
    runs = mixture(folder, chats=1, web=1)
    state = runs.start()
    for length, rows in STEPS[:4]:
        _, state = runs.plan_step(state, length, rows)
    assert branch(mixture(folder), state) == state
    # The long plan is another one: short rows go on, long ones begin.
    other = folder / "other-long"
    if not other.exists():
        pack(folder / "chats", other, LONG)
    paths = {SHORT: str(folder / "short"), LONG: str(other)}
    chats, plans = open_plans("chats", paths)
    runs.datasets["chats"], runs.plans["chats"] = chats, plans
    runs._orders.clear()
    kept = branch(runs, state)
    source = kept["sources"]["chats"]
    assert source["cursor"] == {str(SHORT): state["sources"]["chats"]["cursor"][str(SHORT)]}
    assert kept["weights"] == {} and kept["sources"]["web"] == state["sources"]["web"]
    with pytest.raises(DataError, match=r"chats.plans.128 of .* has fingerprint \w+, not \w+ as"):
        runs.restore(state)
    # By path where it was by plans: that source begins anew, and its own run does not go on.
    web = Mixture(
        {"chats": chats, "web": runs.datasets["web"]}, {"chats": 1}, seed=SEED, block_tokens=256,
        lanes=4,
    )  # fmt: skip
    assert set(branch(web, state)["sources"]) == {"web"}
    with pytest.raises(DataError, match=r"chats.path is not what the run has read .* \(plans\)"):
        web.restore(state)


def refuse(folder: Path, paths: dict[int, Any]) -> list[str]:
    with pytest.raises(DataError) as error:
        open_plans("chats", {n: str(folder / path) for n, path in paths.items()})
    return str(error.value).splitlines()


@pytest.mark.parametrize(
    "paths, lines",
    [
        ({SHORT: "chats"}, ["plans.32=.*chats is no plan .*data pack .*chats --length 32 --out"]),
        ({SHORT: "nowhere"}, ["plans.32=.*nowhere is no plan .no plan.json in it.*data pack DATA"]),
        ({SHORT: "long"}, ["plans.32=.*long is packed for a length of 128. Name it under that"]),
        ({SHORT: "long", LONG: "short"}, ["plans.32=.*length of 128", "plans.128=.*length of 32"]),
        (
            {SHORT: "short", LONG: "of-web"},
            ["plans.128=.*of-web is of another dataset .*web. than data.sources.chats.plans.32 "],
        ),
        (
            {SHORT: "cuts", LONG: "long"},
            [r"plans.32=.*cuts has \d+ cuts inside documents whose .* --max-document-tokens 32:"],
        ),
    ],
)
def test_plans_that_do_not_belong_together_are_refused_a_line_each(
    folder: Path, paths: dict[int, Any], lines: list[str]
) -> None:
    makes: dict[str, Callable[[], object]] = {
        "of-web": lambda: pack(folder / "web", folder / "of-web", LONG),
        "cuts": lambda: pack(folder / "chats", folder / "cuts", SHORT),
    }
    for name in makes.keys() & set(paths.values()):
        if not (folder / name).exists():
            makes[name]()
    found = refuse(folder, paths)
    assert len(found) == len(lines)
    for line, expected in zip(found, lines, strict=True):
        assert re.search(expected, line), line


def test_dataset_that_was_made_anew_is_refused(tmp_path: Path) -> None:
    write_chats(tmp_path / "data", [20, 30], tokenizer_info())
    pack(tmp_path / "data", tmp_path / "plan", SHORT)
    (tmp_path / "data").rename(tmp_path / "old")
    write_chats(tmp_path / "data", [20, 31], tokenizer_info())
    found = refuse(tmp_path, {SHORT: "plan"})
    assert len(found) == 1 and "was packed for a dataset with fingerprint" in found[0]


def test_cuts_are_no_fault_where_every_target_counts(folder: Path) -> None:
    if not (folder / "web-cut").exists():
        pack(folder / "web", folder / "web-cut", SHORT)
    _, plans = open_plans("web", {SHORT: str(folder / "web-cut")})
    assert plans[SHORT].cuts > 0


@pytest.mark.parametrize(
    "cursor",
    [[[0, 0]], {"64": [[0, 0]]}, {"x": [[0, 0]]}, {"32": [[-1, 0]]}, {"32": []}, {"32": 1}],
)
def test_cursor_that_cannot_be_is_refused(folder: Path, cursor: Any) -> None:
    runs = mixture(folder)
    _, state = runs.plan_step(runs.start(), SHORT, 4)
    state["sources"]["chats"]["cursor"] = cursor
    with pytest.raises(DataError, match="data.sources.chats"):
        runs.restore(state)


def test_counting_leaves_out_what_batches_leave_out(folder: Path) -> None:
    """By hand: the first token of a document, what follows eod, what stands behind a join."""
    dataset = TokenDataset(folder / "chats")
    counts = dataset.counts(0, dataset.tokens)
    tokens = dataset.read(0, dataset.tokens)
    follows_eod = np.append(False, tokens[:-1] == dataset.eod_id)
    target = counts & ~follows_eod
    spans = ((5, 20), (100, 12))
    expected = target[6:25].sum() + target[101:113].sum()
    assert counted_targets(dataset, [spans], 32) == expected
    assert counted_targets(dataset, [spans], 40) == target[6:25].sum() + target[101:112].sum()
    assert counted_targets(dataset, [], 40) == 0
