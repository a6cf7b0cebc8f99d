"""The sequence of schemes, and what a stage changes in it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megahybrid.config import parse
from megahybrid.config.attention import AttentionScheme, Nope, Rope
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.scaling import Llama3Scaling, YarnScaling
from megahybrid.errors import ConfigError
from tests.config.example import example

SCHEMES = {
    "local": {"position": {"kind": "rope", "theta": 10000}, "window": 64},
    "global": {"position": {"kind": "nope"}},
}


def plan(pattern: object, num_layers: int = 8) -> LayerPlan:
    return parse(LayerPlan, {"num_layers": num_layers, "pattern": pattern, "schemes": SCHEMES})


@pytest.mark.parametrize(
    ("pattern", "letters"),
    [
        (["local", "local", "local", "global"], "lllglllg"),
        ({"default": "local", "special": "global", "period": 4, "offset": 3}, "lllglllg"),
        ({"default": "local", "special": "global", "period": 4, "offset": 0}, "glllglll"),
        (
            {"default": "local", "special": "global", "period": 3, "offset": 2, "last": "global"},
            "llgllglg",
        ),
        (
            {
                "default": "local",
                "special": "global",
                "period": 3,
                "offset": 0,
                "prefix": ["local", "local"],
            },
            "llgllgll",
        ),
    ],
)
def test_a_pattern_expands_to_one_scheme_per_layer(pattern: object, letters: str) -> None:
    expanded = plan(pattern)
    assert "".join(name[0] for name in expanded.names()) == letters
    assert [scheme.window for scheme in expanded.expand()] == [
        64 if letter == "l" else None for letter in letters
    ]


def test_overrides_merge_into_the_named_scheme_only() -> None:
    before = plan(["local", "global"])
    after = before.with_overrides({"local": {"window": 128, "position": {"theta": 100000}}})
    assert after.schemes["local"].window == 128
    assert after.schemes["local"].position == Rope(kind="rope", theta=100000)
    assert after.schemes["global"] == before.schemes["global"]
    assert before.schemes["local"].window == 64
    assert after.with_overrides({"local": {"window": None}}).schemes["local"].window is None


def test_an_override_keeps_the_scaling_and_can_remove_it() -> None:
    scaled = plan(["local", "global"]).with_overrides(
        {"local": {"position": {"scaling": {"kind": "linear", "factor": 2}}}}
    )
    raised = scaled.with_overrides({"local": {"position": {"theta": 5000}}})
    assert raised.schemes["local"].position.scaling.factor == 2  # type: ignore[union-attr]
    other = scaled.with_overrides(
        {"local": {"position": {"scaling": {"kind": "yarn", "factor": 4, "original_length": 64}}}}
    )
    assert isinstance(other.schemes["local"].position.scaling, YarnScaling)  # type: ignore[union-attr]
    bare = scaled.with_overrides({"local": {"position": {"scaling": None}}})
    assert bare.schemes["local"].position.scaling is None  # type: ignore[union-attr]


def test_a_kind_changes_only_when_it_is_complete() -> None:
    before = plan(["local", "global"])
    dropped = before.with_overrides({"local": {"position": {"kind": "nope"}}})
    assert isinstance(dropped.schemes["local"].position, Nope)
    turned = before.with_overrides({"global": {"position": {"kind": "rope", "theta": 7}}})
    assert turned.schemes["global"].position == Rope(kind="rope", theta=7)
    with pytest.raises(ConfigError, match=r"^here\.global\.position\.theta is missing"):
        before.with_overrides({"global": {"position": {"kind": "rope"}}}, where="here")


def test_an_override_holds_from_its_stage_on() -> None:
    run = example(
        "stages.0.schemes={local: {window: 32}}", "stages.1.schemes={local: {window: 128}}"
    )
    assert run.model.layer_plan.schemes["local"].window == 64
    assert [run.plan_at(i).schemes["local"].window for i in (0, 1)] == [32, 128]
    kept = example("stages.0.schemes={local: {window: 32}}")
    assert kept.plan_at(1).schemes["local"].window == 32


def test_schemes_are_values_that_can_be_keys() -> None:
    one, two = (plan(["local", "global"]).schemes["local"] for _ in range(2))
    assert len({one, two}) == 1
    assert isinstance(one, AttentionScheme)


def test_the_llama3_scaling_follows_its_published_formula() -> None:
    scaling = Llama3Scaling(kind="llama3", factor=8, original_length=8192)
    found = scaling.frequencies(500000.0, 128, np, np.float64)
    for index, value in enumerate(found):
        plain = 500000.0 ** (-2 * index / 128)
        wavelength = 2 * math.pi / plain
        if wavelength < 8192 / 4:
            expected = plain
        elif wavelength > 8192:
            expected = plain / 8
        else:
            smooth = (8192 / wavelength - 1) / 3
            expected = (1 - smooth) * plain / 8 + smooth * plain
        assert value == pytest.approx(expected, rel=1e-12)


def test_the_llama3_scaling_is_a_step_where_its_factors_are_equal() -> None:
    """Without a warning of numpy's of a division by zero, which here would be an error. Theta 4
    and four dimensions: the second wavelength is 4 pi, and the length between."""
    scaling = Llama3Scaling(
        kind="llama3", factor=8, low_frequency_factor=2, high_frequency_factor=2, original_length=20
    )
    found = scaling.frequencies(4.0, 4, np, np.float64)
    assert found.tolist() == [1.0, 0.5 / 8]


@given(st.sampled_from([16, 64, 128]), st.floats(100, 1e6), st.floats(1, 40))
def test_scaled_frequencies_lie_between_plain_and_interpolated(
    dim: int, theta: float, factor: float
) -> None:
    for kind in ("linear", "ntk", "yarn", "llama3"):
        fields = {"kind": kind, "factor": factor}
        if kind in ("yarn", "llama3"):
            fields["original_length"] = 4096
        rope = parse(Rope, {"kind": "rope", "theta": theta, "scaling": fields})
        found = rope.frequencies(dim, np, np.float64)
        plain = Rope(kind="rope", theta=theta).frequencies(dim, np, np.float64)
        assert found.shape == (dim // 2,)
        assert np.all(found <= plain * (1 + 1e-12))
        assert np.all(found >= plain / factor * (1 - 1e-9))


def test_partial_rotation_rotates_an_even_number_of_dimensions() -> None:
    rope = Rope(kind="rope", theta=100, rotary_fraction=0.3)
    assert rope.rotary_dim(64) == 18
    assert rope.frequencies(64, np, np.float64).shape == (9,)
