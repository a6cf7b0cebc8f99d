"""Models that do not fit are proved a layer at a time: the same verdicts as in one piece."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megahybrid.errors import InteropError
from megahybrid.interop import layerwise, logit_proof
from megahybrid.interop.architectures.smollm3 import SmolLM3
from megahybrid.interop.export import choose, export
from megahybrid.interop.logit_proof import prove
from tests.interop.examples import LOCAL, NOPE, checkpoint_of_model, model_of
from tests.interop.test_export import CASES

SOME = (
    "rnope_swa, parallel",
    "qk_norm",
    "windowed nope",
    "rope, yarn",
    "swa, QK-norm",
    "post-norm",
    "post-norm, projection",
    "theta per layer",
    "learned sinks, QK-norm",
    "sandwich, QK-norm, GeGLU",
    "multipliers",
    "llama4, theta per layer, parallel",
)


@pytest.mark.parametrize("case", SOME)
def test_a_layer_at_a_time_is_the_same_proof(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise, "BAND_BYTES", 32 * 4 * 7)  # bands of 7 rows of the vocabulary
    _, schemes, fields = CASES[case]
    model = model_of(schemes, **fields)
    checkpoint_of_model(tmp_path / "run", model)
    export(tmp_path / "run", tmp_path / "out", dtype="bf16", tokenizer="none")
    architecture = choose(model, model.layer_plan, None)

    def again() -> None:
        rows = prove(
            model,
            model.layer_plan,
            tmp_path / "run/checkpoints/step-00000007",
            tmp_path / "out",
            architecture=architecture,
            dtype=torch.bfloat16,
            whole_bytes=0,
        )
        assert [row.what for row in rows] == ["whole", "whole", "generated"]
        assert all(row.equal for row in rows)

    again()
    tensors = load_file(tmp_path / "out/model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3] *= 1.5
    save_file(tensors, tmp_path / "out/model.safetensors", {"format": "pt"})
    with pytest.raises(InteropError, match=r"layers.1.mlp.down_proj.weight is not .* row 3 first"):
        again()
    monkeypatch.setattr(logit_proof, "check_bits", lambda *given: None)
    with pytest.raises(InteropError, match="layer 1 is the first that differs"):
        again()


def test_a_cache_that_keeps_too_little_is_seen_a_layer_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.cache_utils import DynamicSlidingWindowLayer

    model = model_of([LOCAL, NOPE])
    checkpoint_of_model(tmp_path / "run", model)
    export(tmp_path / "run", tmp_path / "out", tokenizer="none")
    right = DynamicSlidingWindowLayer.__init__

    def wrong(self: Any, *given: Any, **named: Any) -> None:
        right(self, *given, **named)
        self.sliding_window -= 1

    monkeypatch.setattr(DynamicSlidingWindowLayer, "__init__", wrong)
    step = tmp_path / "run/checkpoints/step-00000007"
    with pytest.raises(InteropError, match="tokens, generated"):
        prove(
            model,
            model.layer_plan,
            step,
            tmp_path / "out",
            architecture=SmolLM3(),
            whole_bytes=0,
        )


def test_a_layer_has_its_weights_only_while_it_runs() -> None:
    with torch.device("meta"):
        layer = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False))
    names = []

    def load(name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
        names.append(name)
        return torch.eye(3)

    layerwise.lend(layer, "layers.4.", load)
    assert torch.equal(layer(torch.ones(2, 3)), torch.ones(2, 3))
    assert names == ["layers.4.0.weight"]
    assert layer[0].weight.device.type == "meta"
