"""Runs on context ranks with what they serve beside plain steps, against one rank."""

import json
from pathlib import Path
from typing import Any

import pytest

from megahybrid.config.context_features import FEATURES
from megahybrid.ledger import LEDGER_NAME, AttentionEvent, RewindEvent, SuiteEvent, read_ledger
from tests.train.example import STEPS
from tests.train.forked import Nursery, Ranks
from tests.train.test_context_run import TWICE, assert_same_run, held_out

SUITE = """
tasks:
  copy: {kind: copy, lengths: [61], trials: 3}
  recall: {kind: recall, lengths: [96], pairs: 3, trials: 2}
"""
# Names of the table that a run file can ask for, together; each stands in one of these.
TOGETHER: dict[str, tuple[str, ...]] = {
    "looked-at": (
        "validation while training",
        "needles and puzzles",
        "attention samples while training",
        "ZeRO stages 1 and 2",
        "offload of optimizer moments",
        "recompute, activation offload",
        "fewer KV heads than ranks",
        "fused views, split heads",
    ),
    "spike": (
        "ZeRO stage 3",
        "spikes skipped or rewound",
        "joined documents",
        "gradient accumulation",
        "a degree for each length",
    ),
}
COMPILED = "compiled layers"  # by tests/parity: a compiler takes long


def test_all_that_is_served_is_run() -> None:
    served = {f.name for f in FEATURES if not f.is_command and f.refused is None}
    assert served == {name for names in TOGETHER.values() for name in names} | {COMPILED}


def told(run: Path) -> dict[str, list[Any]]:
    """What suites and samples of attention found, and how often the run went back."""
    lines = read_ledger(run / LEDGER_NAME)
    suites = [(line.step, event.tasks) for line, event in lines.of(SuiteEvent)]
    looks = [(line.step, event.layers) for line, event in lines.of(AttentionEvent)]
    rewinds = [line.step for line, _ in lines.of(RewindEvent)]
    return {"suites": suites, "looks": looks, "rewinds": rewinds}


def close(found: Any, expected: Any) -> None:
    """Equal but for the last digits of numbers."""
    found, expected = (json.loads(json.dumps(value, default=vars)) for value in (found, expected))
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            close(found[name], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            close(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    else:
        assert found == expected


@pytest.mark.parametrize("names", TOGETHER.values(), ids=TOGETHER)
def test_what_is_served_gives_the_run_of_one_rank(
    nursery: Nursery, example: Path, names: tuple[str, ...]
) -> None:
    (example / "puzzles.yaml").write_text(SUITE)
    asked = [words for feature in FEATURES if feature.name in names for words in feature.asked]
    spike = "spikes skipped or rewound" in names
    for context in (1, 2):
        # What is asked goes last: a degree for each length stands instead of one.
        ranks = [f"parallel.context={context}", *asked]
        if context == 1:
            ranks = [words for words in ranks if "parallel.context" not in words]
        command = ["train", "run.yaml", f"directory=on{context}", *TWICE, *ranks]
        if spike:  # the planted loss is none that an audit would let pass
            command.append("log.audit_every_steps=5")
        launch = Ranks(
            nursery, command, context, example, fault="spike_in_ninth_step" if spike else None
        )
        assert launch.wait() == [0] * context, launch.text()
    one, two = example / "on1", example / "on2"
    assert_same_run(two, one)
    close(list(held_out(two).items()), list(held_out(one).items()))
    found = told(two)
    close(found, told(one))
    assert bool(found["rewinds"]) == spike
    assert (len(found["suites"]) >= STEPS // 4) == ("needles and puzzles" in names)
    assert bool(found["looks"]) == ("attention samples while training" in names)
