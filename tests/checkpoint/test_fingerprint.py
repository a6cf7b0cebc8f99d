"""What makes a model another one, and what a stage may change."""

from typing import Any, Literal

import pytest

from megahybrid.checkpoint.fingerprint import FACTS, NO_FACTS, model_fingerprint
from megahybrid.config.attention import AttentionScheme, LearnedParameters, QKNorm
from megahybrid.config.base import dump
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_heads": 4,
    "num_kv_heads": 2,
    "layer_plan": {
        "num_layers": 4,
        "pattern": ["local", "global"],
        "schemes": {
            "local": {"position": {"kind": "rope", "theta": 10000.0}, "window": 8},
            "global": {"position": {"kind": "nope"}},
        },
    },
}


def changed(path: str, value: Any) -> ModelConfig:
    def copy(item: Any, keys: list[str]) -> Any:
        if not keys:
            return value
        return {**item, keys[0]: copy(item.get(keys[0], {}), keys[1:])}

    return ModelConfig.model_validate(copy(BASE, path.split(".")))


PLAIN = model_fingerprint(ModelConfig.model_validate(BASE))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("layer_plan.schemes.local.window", 16),
        ("layer_plan.schemes.local.position", {"kind": "rope", "theta": 5e5}),
        ("layer_plan.schemes.local.position", {"kind": "nope"}),
        ("layer_plan.schemes.global.logit_scale", {"kind": "log", "base": 8.0}),
        ("layer_plan.pattern", ["global", "local"]),
        ("initial_std", 0.5),
        ("embedding_std", 0.5),
        ("head_dim", 8),
    ],
)
def test_what_a_stage_may_change_leaves_the_fingerprint(path: str, value: Any) -> None:
    assert model_fingerprint(changed(path, value)) == PLAIN


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("vocab_size", 65),
        ("intermediate_size", 100),
        ("num_kv_heads", 4),
        ("head_dim", 16),
        ("block", "parallel"),
        ("norm", "layernorm"),
        ("eps", 1e-6),
        ("tie_embeddings", False),
        ("logit_scale", 0.25),
        ("layer_plan.num_layers", 6),
        ("layer_plan.schemes.local.qk_norm", {"kind": "rms"}),
        ("layer_plan.schemes.local.score_scale", {"kind": "ssmax"}),
    ],
)
def test_what_makes_another_model_changes_the_fingerprint(path: str, value: Any) -> None:
    assert model_fingerprint(changed(path, value)) != PLAIN


def test_the_sizes_can_be_read() -> None:
    assert PLAIN.startswith("4x32-4q2kv8-64-pre_norm-rms-")


def test_every_field_of_a_model_is_decided_upon() -> None:
    later = {
        "activation": "gelu_tanh",
        "embedding_scale": 2.0,
        "residual_scale": 0.5,
        "logit_softcap": 30.0,
    }
    plain = changed("eps", 1e-6)
    told = {model_fingerprint(plain.model_copy(update={name: later[name]})) for name in later}
    assert len(told | {model_fingerprint(plain)}) == len(later) + 1
    assert set(FACTS) | set(later) | set(NO_FACTS) == set(ModelConfig.model_fields)
    assert set(NO_FACTS) == {"layer_plan", "initial_std", "embedding_std"}


def test_other_words_for_what_is_learned_leave_the_fingerprint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    normed = changed("layer_plan.schemes.local.qk_norm", {"kind": "rms"})
    before = model_fingerprint(normed)
    monkeypatch.setattr(LearnedParameters, "__str__", lambda self: "in quite other words")
    assert model_fingerprint(normed) == before


class LaterNorm(QKNorm):
    offset: float = 0.0


class LaterScheme(AttentionScheme):
    qk_norm: LaterNorm = LaterNorm()
    gate: Literal["none", "head", "element"] = "none"


class LaterPlan(LayerPlan):
    schemes: dict[str, LaterScheme]


class LaterModel(ModelConfig):
    residual_scale: float = 1.0
    layer_plan: LaterPlan


@pytest.mark.parametrize(
    ("path", "default", "other"),
    [
        ("residual_scale", 1.0, 0.5),
        ("layer_plan.schemes.local.gate", "none", "head"),
        ("layer_plan.schemes.local.qk_norm", {"kind": "rms"}, {"kind": "rms", "offset": 1.0}),
    ],
)
def test_a_field_that_came_later_enters_where_it_is_not_its_default(
    path: str, default: Any, other: Any
) -> None:
    """What was written before the field was there goes on being the model that it was."""
    before = path.endswith("qk_norm")
    today = changed(path, default) if before else ModelConfig.model_validate(BASE)

    def later(value: Any) -> str:
        plain, keys = dump(today), path.split(".")
        inner = plain
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        return model_fingerprint(LaterModel.model_validate(plain))

    assert later(default) == model_fingerprint(today)
    assert later(other) != model_fingerprint(today)
