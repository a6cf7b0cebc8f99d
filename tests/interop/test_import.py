"""What enters is the same function, and goes out again to the bit."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megahybrid.checkpoint.reader import verify
from megahybrid.config import load
from megahybrid.config.score_scale import Llama4Scale
from megahybrid.errors import ConfigError, InteropError
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
    written(folder / "theirs", name, fields, dtype)
    with no_word_of_transformers(caplog):
        import_model(folder / "theirs", folder / "run.yaml", folder / "ours")  # compares the logits
    manifest, run = verify(folder / "ours/checkpoints/step-00000000"), load(folder / "run.yaml")
    assert manifest.config["model"] == run.model.model_dump(mode="json")
    assert run.precision == short
    # Left out, the dtype is the source's: no weight is rounded, and none is made longer.
    export(folder / "ours", folder / "back", tokenizer="none", architecture=name)
    before = load_file(folder / "theirs/model.safetensors")
    after = load_file(folder / "back/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


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
    assert (scheme.position.theta, scheme.position.rotary_dim(8)) == (1e4, 4)
    export(tmp_path / "ours", tmp_path / "back", tokenizer="none", architecture=name)
    before, after = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "back")
    )
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert before.keys() == after.keys()


def test_a_partial_rotation_without_a_theta_of_the_same_bits_is_refused(tmp_path: Path) -> None:
    part = {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.3}
    written(tmp_path / "theirs", "Llama", LLAMA | {"head_dim": 96, "rope_parameters": part})
    with pytest.raises(InteropError, match="no theta of ours gives to the same fp32 bits"):
        import_model(tmp_path / "theirs", tmp_path / "run.yaml", tmp_path / "ours")
