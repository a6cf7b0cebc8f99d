"""The table of what context ranks serve: each pair of it is accepted or refused as it says."""

from itertools import combinations
from pathlib import Path

import pytest
import yaml

from megahybrid.config import RunConfig, parse
from megahybrid.config.check import problems
from megahybrid.config.context_features import FEATURES, Feature, check_study, table
from megahybrid.config.yaml_file import apply_overrides
from megahybrid.errors import ConfigError
from tests.train.example import RUN

PAGE = Path(__file__).parents[2] / "docs" / "context_parallel.md"
OF_RUN_FILES = [feature for feature in FEATURES if not feature.is_command]


def run_of(*words: str) -> RunConfig:
    """The example of tests/train with these fields."""
    return parse(RunConfig, apply_overrides(yaml.safe_load(RUN), list(words)))


def said(context: int, *features: Feature) -> list[str]:
    """What `check` says of a run on so many context ranks that asks for these."""
    words = [words for feature in features for words in feature.asked]
    return problems(run_of(f"parallel.context={context}", *words), context)


def test_each_pair_is_refused_exactly_where_the_table_says_so() -> None:
    assert len(OF_RUN_FILES) > 10
    for one, other in combinations(OF_RUN_FILES, 2):
        fields = [words.split("=")[0] for feature in (one, other) for words in feature.asked]
        if len(set(fields)) < len(fields):
            continue  # two values of one field
        refused = [feature.name for feature in (one, other) if feature.refused]
        lines = said(2, one, other)
        assert len(lines) == len(refused), (one.name, other.name, lines)
        assert all("context ranks (parallel.context)" in line for line in lines)


def test_nothing_is_refused_without_context_ranks() -> None:
    for feature in OF_RUN_FILES:
        if "parallel.context" not in feature.asked[0]:
            assert not said(1, feature), feature.name


def test_a_study_says_why_its_runs_have_none() -> None:
    check_study(run_of())
    with pytest.raises(ConfigError, match=r"^a study trains .* not on 4 context ranks .* out\.$"):
        check_study(run_of("parallel.context=4"))


def test_the_page_holds_the_table() -> None:
    assert table() in PAGE.read_text(encoding="utf-8"), (
        "put there what this prints: "
        "python -c 'from megahybrid.config.context_features import table; print(table())'"
    )
