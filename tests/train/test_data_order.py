"""Where every token of a run came from: three stages, two sources, a resume, two data degrees."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megahybrid.data.batches import make_batch
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.mixture import RowPlan
from tests.data.corpus import PlainOrder
from tests.train.example import STEPS, steps_of
from tests.train.forked import Nursery, Ranks

EOD = 1
Row = dict[str, list[int]]
Origin = list[tuple[str, int]]  # source and place in it, of every token of a row


def recorded(run: Path, world: int) -> list[tuple[list[Any], list[Row]]]:
    """Plans and rows of each step that held, rows in the order of the whole step."""
    kept = []
    files = [(run / f"rows-{rank}.jsonl").read_text().splitlines() for rank in range(world)]
    for lines in zip(*files, strict=True):
        steps = [json.loads(line) for line in lines]
        assert all(step["plans"] == steps[0]["plans"] for step in steps)
        of_rank = [step["rows"] for step in steps]
        # Rank r of D takes rows r, r + D, …
        rows = [of_rank[n % world][n // world] for n in range(len(steps[0]["plans"]))]
        assert sum(map(len, of_rank)) == len(rows)
        kept.append((steps[0]["plans"], rows))
    return kept


def origin(plan: Any) -> Origin:
    source, spans = plan
    return [(source, start + i) for start, length in spans for i in range(length)]


@pytest.fixture(scope="module")
def runs(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    folder = tmp_path_factory.mktemp("order")
    shutil.copytree(prepared, folder, dirs_exist_ok=True)
    for name, world, more in (
        ("one", 1, []),
        ("data2", 2, []),
        ("tensor2", 2, ["parallel.tensor=2"]),
    ):
        arguments = ["train", "run.yaml", f"directory={name}", *more]
        # Stopped inside the second stage, where a save of its own is made: no step is done twice.
        ranks = Ranks(nursery, arguments, world, folder, fault="record_rows_and_stop")
        assert ranks.wait() == [75] * world, ranks.text()
        ranks = Ranks(nursery, arguments, world, folder, fault="record_rows")
        assert ranks.wait() == [0] * world, ranks.text()
        attempts = [line.attempt for line in steps_of(folder / name)]
        assert len(attempts) == STEPS and set(attempts) == {1, 2}
    return folder


def test_rows_do_not_depend_on_the_degrees_nor_on_a_resume(runs: Path) -> None:
    one = recorded(runs / "one", 1)
    assert len(one) == STEPS
    assert recorded(runs / "data2", 2) == one
    # Ranks along the tensor axis read the same rows.
    for rank in (0, 1):
        lines = (runs / "tensor2" / f"rows-{rank}.jsonl").read_text().splitlines()
        assert [json.loads(line)["rows"] for line in lines] == [rows for _, rows in one]


def test_rows_are_what_the_file_says_and_joins_are_marked(runs: Path) -> None:
    files = {name: TokenDataset(runs / name) for name in ("books", "code")}
    text = {name: file.read(0, file.tokens).astype(np.int64) for name, file in files.items()}
    for plans, rows in recorded(runs / "one", 1):
        for plan, row in zip(plans, rows, strict=True):
            source, spans = plan
            came_from = origin(plan)
            assert row["tokens"] == [text[name][place] for name, place in came_from]
            begins = [place for _, place in came_from]
            expected, start = [], 0
            heads = {sum(length for _, length in spans[:n]) for n in range(1, len(spans))}
            for start_of_span, length in spans[:-1]:
                end = start_of_span + length
                assert end % 512 == 0 or end == len(text[source])  # the end of a block
            for i in range(len(begins)):
                if i in heads or (i and row["tokens"][i - 1] == EOD):
                    start = i
                expected.append(start)
            assert row["starts"] == expected
            for i, target in enumerate(row["targets"]):
                place = begins[i] + 1
                if row["tokens"][i] == EOD or i + 1 in heads:
                    assert target == -100  # what follows belongs to another document
                elif i + 1 < len(begins):
                    assert target == row["tokens"][i + 1]
                else:
                    follows = place < len(text[source]) and target == text[source][place]
                    assert follows or target == -100


def test_no_token_is_repeated_or_skipped_within_an_epoch(runs: Path) -> None:
    files = {name: TokenDataset(runs / name).tokens for name in ("books", "code")}
    seen: dict[str, Counter[int]] = {name: Counter() for name in files}
    for plans, _ in recorded(runs / "one", 1):
        for plan in plans:
            for source, place in origin(plan):
                seen[source][place] += 1
    epochs = {name: sum(seen[name].values()) / files[name] for name in files}
    assert min(epochs.values()) > 1, epochs  # else the test would say little
    for name, tokens in files.items():
        counts = [seen[name][place] for place in range(tokens)]
        # Lanes stand at most one block apart, so blocks of two epochs overlap by the lanes at most.
        assert max(counts) - min(counts) <= 2
        full = int(epochs[name])
        assert sum(count == full or count == full + 1 for count in counts) >= tokens - 4 * 512


def test_each_source_is_served_as_the_contract_says_whatever_the_lengths(runs: Path) -> None:
    """Against the contract read aloud: lanes, blocks, the least advanced lane."""
    orders = {
        name: PlainOrder(TokenDataset(runs / name).tokens, 1, name, block_tokens=512, lanes=4)
        for name in ("books", "code")
    }
    for plans, _ in recorded(runs / "one", 1):
        for plan in plans:
            came_from = origin(plan)
            expected = orders[plan[0]].row(len(came_from))
            assert [place for _, place in came_from] == [place for place, _ in expected]


def test_weights_are_kept_in_every_stage(runs: Path) -> None:
    """By tokens, within one row of the longest length."""
    shares = {0: {"books": 1.0}, 4: {"books": 0.5, "code": 0.5}, 10: {"books": 0.25, "code": 0.75}}
    had: Counter[str] = Counter()
    share: dict[str, float] = {}
    for step, (plans, _) in enumerate(recorded(runs / "one", 1)):
        if step in shares:
            share, had = shares[step], Counter()
        for plan in plans:
            had[plan[0]] += len(origin(plan))
            for name in ("books", "code"):
                expected = share.get(name, 0.0) * sum(had.values())
                assert abs(had[name] - expected) <= 512


@pytest.mark.parametrize("rows", [1, 2])
def test_what_does_not_count_is_left_out_of_targets_alone(rows: int, prepared: Path) -> None:
    """A single row's slices of one tensor are contiguous: they must not share its memory."""
    code = TokenDataset(prepared / "code")
    plans = [RowPlan("code", ((64 * row, 512),)) for row in range(rows)]
    batch = make_batch({"code": code}, plans, 512)
    moved = batch.tensors()
    np.testing.assert_array_equal(moved.tokens, batch.tokens)
    np.testing.assert_array_equal(moved.targets, batch.targets)
    assert (moved.tokens >= 0).all() and (moved.targets == -100).any()


def test_run_whose_data_end_saves_and_is_done(nursery: Nursery, example: Path) -> None:
    arguments = ["train", "run.yaml", "directory=out", "data.exhausted=stop"]
    for _ in range(2):  # again, it finds itself done
        ranks = Ranks(nursery, arguments, 1, example)
        assert ranks.wait() == [0], ranks.text()
    assert "data.sources.books is exhausted (" in ranks.text()
    assert [line.step for line in steps_of(example / "out")] == [1, 2, 3]
    assert (example / "out/checkpoints/step-00000003").exists()
