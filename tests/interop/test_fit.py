"""Which Hugging Face class supports which plan, as found by running each of them."""

import pytest

from megahybrid.interop.architectures.table import huggingface_fits
from tests.config.example import example
from tests.config.test_counting import shipped

PARALLEL = ["model.block=parallel", "model.norm=layernorm"]
LOCAL = "model.layer_plan.schemes.local"
GLOBAL = "model.layer_plan.schemes.global"
HEAD = "{kind: rms}"
PROJECTION = "{kind: rms, over: projection}"


def norms(value: str) -> list[str]:
    return [f"{LOCAL}.qk_norm={value}", f"{GLOBAL}.qk_norm={value}"]


def biases(local: str, full: str) -> list[str]:
    return [f"{LOCAL}.bias={local}", f"{GLOBAL}.bias={full}"]


def temperatures(value: str) -> list[str]:
    return [f"{LOCAL}.score_scale={value}", f"{GLOBAL}.score_scale={value}"]


WEIGHTLESS = "{kind: rms, weight: none}"
YARN = "{kind: yarn, factor: 4, original_length: 64}"
BESIDE_YARN = [
    f"{name}.position={{kind: rope, theta: 10000, scaling: {YARN}}}" for name in (LOCAL, GLOBAL)
]
THETAS_UNDER_YARN = [f"{GLOBAL}.position.theta=500000"]
ROPE_EVERYWHERE = [f"{GLOBAL}.position={{kind: rope, theta: 10000}}"]
FULL = [f"{LOCAL}.window=null"]
SINKS = [f"{LOCAL}.sink=true", f"{GLOBAL}.sink=true"]
NOPE_EVERYWHERE = [f"{LOCAL}.position={{kind: nope}}", *FULL]
THETAS = [f"{GLOBAL}.position={{kind: rope, theta: 500000}}"]

PLANS = {
    "rnope_swa, pre-norm": ([], {"SmolLM3", "GraniteSWA"}),
    "rnope_swa, parallel": (PARALLEL, {"Cohere2", "CohereCompass"}),
    "rnope_swa, post-norm, QK-norm per head": (
        ["model.block=post_norm", *norms(HEAD)],
        {"Exaone4"},
    ),
    "rnope_swa, post-norm, QK-norm over projection": (
        ["model.block=post_norm", *norms(PROJECTION)],
        {"Olmo3"},
    ),
    "rnope_swa, pre-norm, QK-norm": (norms(HEAD), {"ExaoneMoe", "Mellum", "Flint"}),
    "rnope_swa, pre-norm, QK-norm, sinks": (norms(HEAD) + SINKS, {"Flint"}),
    "rnope_swa, pre-norm, sinks": (SINKS, {"GraniteSWA"}),
    "sinks in some layers": (SINKS[:1], {"GraniteSWA"}),
    "rnope_swa, parallel, sinks": (PARALLEL + SINKS, set()),
    "rnope full, pre-norm, QK-norm": (FULL + norms(HEAD), {"ExaoneMoe", "Mellum", "Flint"}),
    "theta per kind, pre-norm, QK-norm": (THETAS + norms(HEAD), {"Mellum"}),
    "theta per kind, parallel": (THETAS + PARALLEL, {"CohereCompass"}),
    "alternating full, pre-norm": (FULL, {"SmolLM3", "GraniteSWA", "Llama4"}),
    "alternating full, parallel": (FULL + PARALLEL, {"Cohere2", "CohereCompass"}),
    "alternating full, post-norm": (
        ["model.block=post_norm", *FULL, *norms(PROJECTION)],
        {"Olmo3"},
    ),
    "rope everywhere, full, post-norm": (
        ["model.block=post_norm", *ROPE_EVERYWHERE, *FULL, *norms(PROJECTION)],
        {"Olmo2", "Olmo3"},
    ),
    "nope everywhere, post-norm": (
        ["model.block=post_norm", *NOPE_EVERYWHERE, *norms(PROJECTION)],
        {"Olmo2", "Olmo3"},
    ),
    "nope everywhere, pre-norm": (
        NOPE_EVERYWHERE,
        {"SmolLM3", "Llama", "Mistral", "GraniteSWA", "Llama4"},
    ),
    "nope everywhere, parallel": (NOPE_EVERYWHERE + PARALLEL, {"Cohere2", "CohereCompass"}),
    "nope everywhere, QK-norm": (
        NOPE_EVERYWHERE + norms(HEAD),
        {"Qwen3", "ExaoneMoe", "Mellum", "Flint"},
    ),
    "rope everywhere, full": (
        ROPE_EVERYWHERE + FULL,
        {"SmolLM3", "Llama", "Mistral", "GraniteSWA", "Llama4"},
    ),
    "rope everywhere, full, parallel": (
        ROPE_EVERYWHERE + FULL + PARALLEL,
        {"Cohere2", "CohereCompass", "Cohere"},
    ),
    "rope everywhere, windowed": (ROPE_EVERYWHERE, {"SmolLM3", "GraniteSWA"}),
    "rope everywhere, one window": (
        [*ROPE_EVERYWHERE, f"{GLOBAL}.window=64"],
        {"SmolLM3", "Mistral", "GraniteSWA"},
    ),
    "biases, rope everywhere": (ROPE_EVERYWHERE + biases("qkv", "qkv"), {"Qwen2"}),
    "biases, rnope_swa": (biases("qkv", "qkv"), set()),
    "biases in some layers": (ROPE_EVERYWHERE + biases("qkv", "none"), set()),
    "rope everywhere, windowed, QK-norm": (ROPE_EVERYWHERE + norms(HEAD), {"Qwen3", "Mellum"}),
    "theta per kind, pre-norm": (THETAS, {"GraniteSWA"}),
    "theta per kind, post-norm": (
        ["model.block=post_norm", *THETAS, *norms(PROJECTION)],
        {"Olmo3"},
    ),
    "windowed nope": ([f"{GLOBAL}.window=64"], {"SmolLM3", "GraniteSWA"}),
    "windowed nope, parallel": ([f"{GLOBAL}.window=64", *PARALLEL], set()),
    "two windows": ([f"{GLOBAL}.window=65"], set()),
    "window of one key": ([f"{LOCAL}.window=1"], set()),
    "chunks": ([*FULL, f"{LOCAL}.chunk=64"], {"Llama4"}),
    "chunks, temperature, weightless QK-norm": (
        [
            *FULL,
            f"{LOCAL}.chunk=64",
            f"{LOCAL}.qk_norm={{kind: rms, weight: none}}",
            f"{GLOBAL}.score_scale={{kind: llama4}}",
        ],
        {"Llama4"},
    ),
    "two chunks": ([*FULL, f"{LOCAL}.chunk=64", f"{GLOBAL}.chunk=32"], set()),
    "chunks and windows": ([f"{GLOBAL}.chunk=64"], set()),
    "weightless QK-norm without rotation": (FULL + norms(WEIGHTLESS), set()),
    "weightless QK-norm and an attention factor": (
        [*FULL, f"{LOCAL}.qk_norm={WEIGHTLESS}", f"{LOCAL}.position.scaling={YARN}"],
        set(),
    ),
    "temperature from 1, full": (
        [*FULL, f"{GLOBAL}.score_scale={{kind: llama4}}"],
        {"Llama4"},
    ),
    "temperature from 0": (
        [*FULL, f"{GLOBAL}.score_scale={{kind: llama4, offset: 0}}"],
        set(),
    ),
    "temperature of rotated layers": (
        ROPE_EVERYWHERE + FULL + temperatures("{kind: llama4, floor: 64}"),
        set(),
    ),
    "temperature from 0 beside yarn": (
        BESIDE_YARN + FULL + temperatures("{kind: llama4, floor: 64, offset: 0}"),
        {"Ministral3"},
    ),
    "temperature from 1 beside yarn": (
        BESIDE_YARN + FULL + temperatures("{kind: llama4, floor: 64}"),
        set(),
    ),
    "temperature of another length than yarn's": (
        BESIDE_YARN + FULL + temperatures("{kind: llama4, floor: 65, offset: 0}"),
        set(),
    ),
    "position-dependent logits": ([f"{GLOBAL}.score_scale={{kind: llama4}}"], set()),
    "logits times 0.25, parallel": (
        ["model.logit_scale=0.25", *PARALLEL],
        {"Cohere2", "CohereCompass"},
    ),
    "logits times 0.25, pre-norm": (["model.logit_scale=0.25"], {"GraniteSWA"}),
    "head_dim of its own": (["model.head_dim=24"], {"SmolLM3", "GraniteSWA"}),
    "embeddings and branches scaled, pre-norm": (
        ["model.embedding_scale=12", "model.residual_scale=0.22"],
        {"GraniteSWA"},
    ),
    "two thetas under one scaling": (BESIDE_YARN + THETAS_UNDER_YARN, {"GraniteSWA"}),
    "two scalings": ([*BESIDE_YARN, f"{LOCAL}.position.scaling.factor=8"], set()),
    "odd head_dim": (
        ["model.head_dim=23", f"{LOCAL}.position.rotary_fraction=0.5"],
        set(),
    ),
    "scaling in a hybrid": (
        [f"{LOCAL}.position.scaling={{kind: yarn, factor: 4, original_length: 64}}"],
        {"SmolLM3", "GraniteSWA"},
    ),
    "partial rotation": ([f"{LOCAL}.position.rotary_fraction=0.5"], {"SmolLM3", "GraniteSWA"}),
    "partial rotation, head's": (
        [f"{LOCAL}.position.rotary_fraction=0.5", f"{LOCAL}.position.spectrum=head"],
        {"SmolLM3", "GraniteSWA"},
    ),
    "partial rotation, head's, scaled": (
        [
            f"{LOCAL}.position.rotary_fraction=0.5",
            f"{LOCAL}.position.spectrum=head",
            f"{LOCAL}.position.scaling={{kind: linear, factor: 4}}",
        ],
        {"SmolLM3", "GraniteSWA"},
    ),
    "partial rotation, head's, scaled by ntk": (
        [
            f"{LOCAL}.position.rotary_fraction=0.5",
            f"{LOCAL}.position.spectrum=head",
            f"{LOCAL}.position.scaling={{kind: ntk, factor: 4}}",
        ],
        set(),
    ),
    "partial rotation, scaled": (
        [
            f"{LOCAL}.position.rotary_fraction=0.5",
            f"{LOCAL}.position.scaling={{kind: linear, factor: 4}}",
        ],
        set(),
    ),
}


@pytest.mark.parametrize(("overrides", "names"), PLANS.values(), ids=PLANS)
def test_a_plan_is_supported_by_the_classes_that_were_seen_to_run_it(
    overrides: list[str], names: set[str]
) -> None:
    fits = huggingface_fits(example(*overrides).model)
    assert {fit.architecture for fit in fits if fit.can} == names
    assert all(fit.how for fit in fits if fit.can)
    assert all(fit.reasons and not fit.how for fit in fits if not fit.can)


def test_the_studys_qk_norm_variant_is_the_old_cohere() -> None:
    fits = huggingface_fits(shipped("qk_norm_8b"))
    assert [(fit.architecture, fit.how) for fit in fits if fit.can] == [
        ("Cohere", "use_qk_norm true")
    ]
    assert [f.architecture for f in huggingface_fits(shipped("command_a")) if f.can] == [
        "Cohere2",
        "CohereCompass",
    ]
    assert "Llama" in [f.architecture for f in huggingface_fits(shipped("llama31_8b")) if f.can]
    assert [f.architecture for f in huggingface_fits(shipped("olmo3_7b")) if f.can] == ["Olmo3"]
    assert [f.architecture for f in huggingface_fits(shipped("gemma3_1b")) if f.can] == ["Gemma3"]
    assert [f.architecture for f in huggingface_fits(shipped("rnope_swa_sinks_1b")) if f.can] == [
        "GraniteSWA"
    ]
