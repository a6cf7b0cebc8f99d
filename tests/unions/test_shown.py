"""Whatever a layer has, a reader sees it: in `describe`, on a model card, on a run's page and in
the line that an import refuses a plan with."""

from collections.abc import Callable
from typing import Any

import pytest

from megahybrid.config import RunConfig, dump, parse
from megahybrid.config.attention import AttentionScheme
from megahybrid.config.describe import describe, render
from megahybrid.interop import model_card
from megahybrid.report import model_strip
from tests.config.example import example

ROPE = {"kind": "rope", "theta": 10000.0}
NEAR = {"position": ROPE, "window": 4}
# A value of each field, beside one that has all at their defaults.
SHOWN: dict[str, list[dict[str, Any]]] = {
    "position": [
        {"position": ROPE},
        {"position": ROPE | {"rotary_fraction": 0.5}},
        {"position": ROPE | {"rotary_fraction": 0.5, "spectrum": "head"}},
        {"position": ROPE | {"scaling": {"kind": "linear", "factor": 3.0}}},
    ],
    "window": [{"window": 5}],
    "chunk": [{"chunk": 5}],
    "qk_norm": [
        {"qk_norm": {"kind": "rms"}},
        {"qk_norm": {"kind": "rms", "weight": "none"}},
        {"qk_norm": {"kind": "rms", "weight": "per_head"}},
        {"qk_norm": {"kind": "rms", "over": "projection"}},
    ],
    "score_scale": [{"score_scale": {"kind": "log", "base": 3.0}}],
    "gate": [{"gate": "head"}, {"gate": "element"}],
    "bias": [{"bias": "qkv"}],
    "sink": [{"sink": True}],
    "near": [{"near": NEAR, "fuse": {"gate": "head"}}],
    "fuse": [{"near": NEAR, "fuse": {"gate": "token"}}],
    "split": [{"near": NEAR, "split": {"near": 1, "of": 2}}],
}


def run_of(fields: dict[str, Any]) -> RunConfig:
    tree = dump(example())
    plan = tree["model"]["layer_plan"]
    plan["schemes"]["global"] = {"position": {"kind": "nope"}} | fields
    return parse(RunConfig, tree)


def described(run: RunConfig) -> str:
    text = render(describe(run))
    return text[text.index("Layers at") : text.index("Stages")]


def on_a_card(run: RunConfig) -> str:
    rows = model_card._layer_table(run.model.layer_plan)
    assert len({row.count("|") for row in rows}) == 1
    return "\n".join(rows)


def on_a_page(run: RunConfig) -> str:
    table = model_strip._kinds_table(run, run.model.layer_plan)
    assert {len(row) for row in table.rows} == {len(table.head)}
    return str(table)


def in_a_line(run: RunConfig) -> str:
    return model_card.scheme_in_words(run.model.layer_plan.schemes["global"])


PLACES: dict[str, Callable[[RunConfig], str]] = {
    "describe": described,
    "card": on_a_card,
    "page": on_a_page,
    "line": in_a_line,
}


@pytest.mark.parametrize("place", PLACES)
def test_a_layer_that_differs_reads_differently(place: str) -> None:
    """Parameters and bytes, which `describe` gives as well, are no words for what is there."""
    assert SHOWN.keys() == AttentionScheme.model_fields.keys()
    told = {"plain": PLACES[place](run_of({}))}
    for field, values in SHOWN.items():
        for number, value in enumerate(values):
            told[f"{field}{number}"] = PLACES[place](run_of(value))
    if place == "describe":
        told = {name: "".join(c for c in text if not c.isdigit()) for name, text in told.items()}
    seen: dict[str, str] = {}
    for name, text in told.items():
        assert text not in seen, f"{name} reads as {seen[text]} does"
        seen[text] = name


@pytest.mark.parametrize("place", PLACES)
def test_gates_biases_and_sinks_are_named(place: str) -> None:
    run = run_of({"gate": "head", "bias": "qkv", "sink": True, "qk_norm": {"kind": "rms"}})
    for words in ("gate per head", "bias of qkv", "learned sinks"):
        assert words in PLACES[place](run)
