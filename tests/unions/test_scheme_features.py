"""The table of what a scheme's parts go with: each pair is served, or refused in its line."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from megahybrid.config import RunConfig, parse
from megahybrid.config.attention import AttentionScheme
from megahybrid.config.check import WITHOUT_SINKS, problems
from megahybrid.config.context_plan import plan_context
from megahybrid.config.scheme_features import (
    ANNEAL,
    BESIDE,
    PARTS,
    REFUSED,
    Beside,
    refusal,
    table,
)
from megahybrid.config.yaml_file import apply_overrides
from megahybrid.errors import ConfigError
from megahybrid.interop import surgery
from megahybrid.model.kernels import kernel
from megahybrid.model.kernels.registry import TABLE
from tests.interop.examples import model_of, plan_of
from tests.train.example import RUN
from tests.unions.probes import analysis, cache_, self_test

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
NOPE: dict[str, Any] = {"position": {"kind": "nope"}}
PAIRS = list(combinations(PARTS, 2))
OF_RUN_FILES = [beside for beside in BESIDE if beside.asked]


def scheme_of(*parts: str) -> dict[str, Any]:
    """A layer without a window that has these parts."""
    return NOPE | {field: value for part in parts for field, value in PARTS[part].items()}


def whole_model(part: str, *others: str) -> Any:
    return model_of([scheme_of(part, *others), NOPE | {"window": 6}])


def told_by_check(part: str, beside: Beside) -> list[str]:
    """What `check` says of a run whose full layers have the part, beside this."""
    run = apply_overrides(yaml.safe_load(RUN), list(beside.asked))
    schemes = run["model"]["layer_plan"]["schemes"]
    windowed = beside is ANNEAL and part != "chunk"  # what anneals must have begun
    schemes["global"] = scheme_of(part) | ({"window": 128} if windowed else {})
    parsed = parse(RunConfig, run)
    if parsed.parallel.context_axis > 1:
        plan_context(parsed.model, parsed.parallel, parsed.model.layer_plan, 512)
    return problems(parsed, 2)


def surgery_of(part: str) -> None:
    surgery.changes(plan_of([NOPE]), plan_of([scheme_of(part)]))


PLACES: dict[str, Callable[[str], None]] = {
    "documents, packed": lambda part: self_test(whole_model(part)),
    "KV cache": lambda part: cache_(whole_model(part)),
    "attention analysis": lambda part: analysis(whole_model(part)),
    "surgery of a plan": surgery_of,
}


def test_the_table_names_what_there_is() -> None:
    assert PLACES.keys() == {beside.name for beside in BESIDE if not beside.asked}
    names = {*PARTS, *(beside.name for beside in BESIDE)}
    assert {name for pair in REFUSED for name in pair} <= names


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_two_parts_go_together_where_the_table_says_so(one: str, other: str) -> None:
    """A pair that is served is decoded from a cache and analysed: logits are the plain model's."""
    refused = refusal(one, other)
    if refused is not None:
        with pytest.raises(ConfigError) as raised:
            parse(AttentionScheme, scheme_of(one, other), where="scheme")
        assert refused[1] in str(raised.value) and "\n" not in str(raised.value)
        return
    cache_(whole_model(one, other))
    analysis(whole_model(one, other))


@pytest.mark.parametrize("beside", OF_RUN_FILES, ids=lambda beside: beside.name)
def test_check_refuses_what_the_table_refuses_and_nothing_else(beside: Beside) -> None:
    for part in PARTS:
        lines, refused = told_by_check(part, beside), refusal(part, beside.name)
        if refused is None:
            assert lines == [], (part, lines)
        else:
            assert len(lines) == 1 and refused[1] in lines[0], (part, lines)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("part", PARTS)
def test_a_part_goes_through_each_place(part: str, place: str) -> None:
    refused = refusal(part, place)
    if refused is None:
        PLACES[place](part)
        return
    with pytest.raises(ConfigError) as raised:
        PLACES[place](part)
    assert refused[1] in str(raised.value)


def test_kernels_without_sinks_are_those_of_the_registry() -> None:
    without = [
        each.name
        for each in TABLE
        if not each.needs and "sinks" not in each.serves and each.sums is kernel._no_halves
    ]
    assert without == list(WITHOUT_SINKS)


def test_the_page_holds_the_table() -> None:
    assert table() in PAGE.read_text(encoding="utf-8"), (
        "put there what this prints: "
        "python -c 'from megahybrid.config.scheme_features import table; print(table())'"
    )
