"""What enters is the same function, and goes out again to the bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megahybrid.checkpoint.reader import verify
from megahybrid.config import load
from megahybrid.config.attention import Rope
from megahybrid.config.score_scale import Llama4Scale
from megahybrid.errors import ConfigError, InteropError
from megahybrid.interop.architectures.table import by_name, of_model_type
from megahybrid.interop.export import export
from megahybrid.interop.import_model import import_model
from tests.interop.stock_models import (
    FULL,
    LLAMA,
    NAMES,
    SLIDING,
    configs,
    no_word_of_transformers,
    written,
)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_a_model_goes_in_and_out_again_to_the_bit(
    name: str,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path_factory.mktemp(name)
    fields = data.draw(configs(name))
    dtype, short = data.draw(st.sampled_from((("float32", "fp32"), ("bfloat16", "bf16"))))
    sinks = name in ("GraniteSWA", "Flint") and data.draw(st.booleans())
    written(folder / "theirs", name, fields, dtype, sinks=sinks)
    with no_word_of_transformers(caplog):
        import_model(folder / "theirs", folder / "run.yaml", folder / "ours")  # compares the logits
    manifest, run = verify(folder / "ours/checkpoints/step-00000000"), load(folder / "run.yaml")
    assert manifest.config["model"] == run.model.model_dump(mode="json")
    assert run.precision == short
    assert {scheme.sink for scheme in run.model.layer_plan.expand()} == {sinks}
    # Left out, the dtype is the source's: no weight is rounded, and none is made longer.
    export(folder / "ours", folder / "back", tokenizer="none", architecture=name)
    before = load_file(folder / "theirs/model.safetensors")
    after = load_file(folder / "back/model.safetensors")
    assert before.keys() == after.keys()
    for key in before:
        if name == "Gemma3" and "norm" in key and dtype == "float32":
            # Its class computes with 1 + w in fp32, and that has the same bits.
            assert torch.equal(1 + before[key], 1 + after[key])
        else:
            assert torch.equal(before[key], after[key])


@pytest.mark.parametrize("name", ["GraniteSWA", "Flint"])
def test_sinks_are_learned_in_the_schemes_of_which_some_take_weight(
    name: str, tmp_path: Path
) -> None:
    """A config does not tell: where a folder's sinks are all -1e9 it was made by an export of a
    model that has none."""
    fields = LLAMA | {"layer_types": [SLIDING, FULL], "sliding_window": 5, "num_experts": 0}
    if name == "GraniteSWA":
        del fields["num_experts"]
        fields["layer_rope_theta"] = [1e4, 0]
    folder = written(tmp_path / "theirs", name, fields)
    tensors = load_file(folder / "model.safetensors")
    tensors[by_name(name).file_name("model.layers.1.self_attn.sinks")][2] = 0.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    import_model(folder, tmp_path / "run.yaml", tmp_path / "ours")
    run = load(tmp_path / "run.yaml")
    assert [scheme.sink for scheme in run.model.layer_plan.expand()] == [False, True]
    export(tmp_path / "ours", tmp_path / "back", tokenizer="none", architecture=name)
    after = load_file(tmp_path / "back/model.safetensors")
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[key], tensors[key]) for key in after)
    without = tmp_path / "without.yaml"
    text = (tmp_path / "run.yaml").read_text(encoding="utf-8")
    assert "sink: true" in text
    without.write_text(text.replace("sink: true", "sink: false"), encoding="utf-8")
    with pytest.raises(ConfigError, match="layer 1 is .* the source's is .*, learned sinks"):
        import_model(folder, without, tmp_path / "others")


def test_a_temperature_enters_beside_a_rotation_without_a_scaling(tmp_path: Path) -> None:
    """Such a rotation has a length it was made from for the temperature alone."""
    told = {"original_max_position_embeddings": 64, "llama_4_scaling_beta": 0.4}
    rope = {"rope_type": "default", "rope_theta": 1e4} | told
    written(tmp_path / "theirs", "Ministral3", LLAMA | {"rope_parameters": rope})
    import_model(tmp_path / "theirs", tmp_path / "run.yaml", tmp_path / "ours")
    (scheme,) = set(load(tmp_path / "run.yaml").model.layer_plan.expand())
    assert scheme.score_scale == Llama4Scale(kind="llama4", floor=64, coefficient=0.4, offset=0)
    with pytest.raises(ConfigError, match="floor is the original length of a yarn or llama3"):
        export(tmp_path / "ours", tmp_path / "back", tokenizer="none", architecture="Ministral3")


def test_the_rope_of_llama_4_scout_comes_in_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers notes in its log that both factors should not be equal, and computes a step."""
    told = {"low_freq_factor": 1.0, "high_freq_factor": 1.0, "factor": 16.0}
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "original_max_position_embeddings": 64}
    fields = LLAMA | {"moe_layers": [], "rope_parameters": rope | told, "no_rope_layers": [1, 0]}
    written(tmp_path / "theirs", "Llama4", fields)
    with no_word_of_transformers(caplog):
        import_model(tmp_path / "theirs", tmp_path / "run.yaml", tmp_path / "ours")
    scaling = load(tmp_path / "run.yaml").model.layer_plan.expand()[0].position.scaling
    assert (scaling.low_frequency_factor, scaling.high_frequency_factor) == (1.0, 1.0)
    with no_word_of_transformers(caplog):
        export(tmp_path / "ours", tmp_path / "back", tokenizer="none", architecture="Llama4")
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert rope | told == config["rope_parameters"]


@pytest.mark.parametrize("name", ["Llama", "Cohere2", "Olmo3"])
def test_a_partial_rotation_goes_in_and_out_again_to_the_bit(name: str, tmp_path: Path) -> None:
    part = {"rope_type": "proportional", "rope_theta": 1e8, "partial_rotary_factor": 0.5}
    fields = LLAMA | {"rope_parameters": part}
    if name == "Olmo3":
        whole = {"rope_type": "default", "rope_theta": 1e4}
        fields |= {"rope_parameters": {SLIDING: part, FULL: whole}, "sliding_window": 5}
        fields |= {"layer_types": [SLIDING, FULL]}
    if name == "Cohere2":
        fields |= {"layer_types": [SLIDING] * 2, "sliding_window": 5, "tie_word_embeddings": True}
    written(tmp_path / "theirs", name, fields)
    import_model(tmp_path / "theirs", tmp_path / "run.yaml", tmp_path / "ours")
    scheme = load(tmp_path / "run.yaml").model.layer_plan.expand()[0]
    assert (scheme.position.theta, scheme.position.rotary_dim(8)) == (1e8, 4)
    assert scheme.position.spectrum == "head"
    export(tmp_path / "ours", tmp_path / "back", tokenizer="none", architecture=name)
    before, after = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "back")
    )
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert before.keys() == after.keys()


GEMMA = LLAMA | {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "layer_types": [SLIDING, FULL],
    "sliding_window": 5,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        FULL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    },
}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_activation": "relu"}, "hidden_activation=relu is not supported"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not"),
    ],
)
def test_a_gemma_that_our_model_is_not_is_refused_by_the_field(
    fields: dict[str, Any], words: str
) -> None:
    import transformers

    with pytest.raises(InteropError, match=words):
        of_model_type("gemma3_text").from_config(transformers.Gemma3TextConfig(**GEMMA | fields))


def test_a_gemma_comes_in_as_the_model_that_it_is() -> None:
    import transformers

    model = of_model_type("gemma3_text").from_config(transformers.Gemma3TextConfig(**GEMMA))
    local, whole = model.layer_plan.expand()
    assert (local.position.theta, local.window, whole.window) == (1e4, 5, None)
    assert (whole.position.theta, whole.position.scaling.factor) == (1e6, 8.0)
    assert (model.block, model.activation, model.embedding_scale) == (
        "sandwich", "gelu_tanh", 32**0.5,
    )  # fmt: skip
    assert local.qk_norm.kind == "rms" and local.score_scale.kind == "sqrt_dim"


PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.3}
NUMBERS = [1.0, 1.25, 2.5, 8.0]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "short_factor": NUMBERS,
    "long_factor": NUMBERS,
}


@pytest.mark.parametrize(
    ("fields", "position"),
    [
        (
            {"head_dim": 96, "rope_parameters": PROPORTIONAL},
            {"rotary_fraction": 0.3, "spectrum": "head"},
        ),
        (
            {"rope_parameters": PROPORTIONAL | {"partial_rotary_factor": 0.5, "factor": 2.0}},
            {
                "rotary_fraction": 0.5,
                "spectrum": "head",
                "scaling": {"kind": "linear", "factor": 2.0},
            },
        ),
        (
            {"rope_parameters": LONGROPE},
            {
                "scaling": {
                    "kind": "longrope",
                    "factors": NUMBERS,
                    "factor": 8.0,
                    "original_length": 16,
                }
            },
        ),
    ],
    ids=["proportional", "proportional-scaled", "longrope"],
)
def test_a_rotation_comes_in_by_its_own_frequencies_and_goes_out_again(
    fields: dict[str, Any], position: dict[str, Any], tmp_path: Path
) -> None:
    """Logits are compared at lengths beyond longrope's 16 tokens too."""
    written(tmp_path / "theirs", "Llama", LLAMA | fields)
    import_model(tmp_path / "theirs", tmp_path / "run.yaml", tmp_path / "ours")
    (scheme,) = load(tmp_path / "run.yaml").model.layer_plan.schemes.values()
    assert scheme.position == Rope.model_validate({"kind": "rope", "theta": 1e4} | position)
    export(tmp_path / "ours", tmp_path / "back", tokenizer="none", architecture="Llama")
    before, after = (
        json.loads((tmp_path / folder / "config.json").read_text())["rope_parameters"]
        for folder in ("theirs", "back")
    )
    assert before.items() <= after.items()


def test_longrope_that_switches_with_the_length_is_refused(tmp_path: Path) -> None:
    longer = LONGROPE | {"long_factor": [1.0, 2.0, 4.0, 16.0]}
    written(tmp_path / "theirs", "Llama", LLAMA | {"rope_parameters": longer})
    with pytest.raises(InteropError, match="rope_type=longrope with a long_factor that is not its"):
        import_model(tmp_path / "theirs", tmp_path / "run.yaml", tmp_path / "ours")
