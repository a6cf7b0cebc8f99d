"""What does not enter: pickles, fields that our model lacks, tensors too many or too few."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megahybrid.errors import InteropError, MegahybridError
from megahybrid.interop import hf_weights
from megahybrid.interop.import_model import import_model
from tests.interop.stock_models import FULL, LLAMA, SLIDING, written

EXPERTS = {
    "mlp_layer_types": ["dense", "sparse"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
}
KINDS = {"rope_parameters": dict.fromkeys((SLIDING, FULL), LLAMA["rope_parameters"])}


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("beside", [True, False], ids=["beside_safetensors", "alone"])
def test_no_pickle_is_ever_read(beside: bool, tmp_path: Path) -> None:
    folder = written(tmp_path / "theirs", "Llama", LLAMA)
    canary = tmp_path / "canary"
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt"):
        torch.save({"lm_head.weight": Canary(canary)}, folder / name)
    index = {"weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    if beside:
        import_model(folder, tmp_path / "run.yaml", tmp_path / "ours")
    else:
        (folder / "model.safetensors").unlink()
        with pytest.raises(InteropError, match="Pickles can run code and are never read"):
            import_model(folder, tmp_path / "run.yaml", tmp_path / "ours")
        (folder / hf_weights.INDEX_NAME).write_text(json.dumps(index))
        with pytest.raises(InteropError, match="no safetensors file here"):
            import_model(folder, tmp_path / "run.yaml", tmp_path / "ours")
        (folder / hf_weights.INDEX_NAME).unlink()
        (folder / hf_weights.INDEX_NAME).mkdir()
        with pytest.raises(InteropError, match="index.json is damaged"):
            import_model(folder, tmp_path / "run.yaml", tmp_path / "ours")
    assert not canary.exists()


def test_a_renamed_pickle_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "theirs", "Llama", LLAMA)
    torch.save(Canary(tmp_path / "canary"), folder / "model.safetensors")
    with pytest.raises(InteropError, match="cannot be read"):
        import_model(folder, tmp_path / "run.yaml", tmp_path / "ours")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("Llama", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("Llama", {"hidden_act": "gelu"}, "hidden_act=gelu is not supported"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type=dynamic is not supported",
        ),
        ("SmolLM3", {"layer_types": [SLIDING] * 2, "sliding_window": 4}, "use_sliding_window"),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": 1}, "windows below 2 keys"),
        ("Mistral", {"layer_types": [FULL, SLIDING]}, "model_type=ministral is none"),
        ("Mellum", EXPERTS | KINDS, r"mlp_layer_types\[1\]=sparse is a layer of experts"),
        ("ExaoneMoe", EXPERTS, r"mlp_layer_types\[1\]=sparse is a layer of experts"),
        (
            "Flint",
            {"num_experts": 4, "mlp_only_layers": [0]},
            r"mlp_only_layers=\[0\] makes layer 1 one of experts",
        ),
        ("GraniteSWA", {"embedding_multiplier": -12.0}, "embedding_multiplier=-12.0 is not"),
        ("GraniteSWA", {"logits_scaling": 0}, "logits_scaling=0 is not supported"),
        ("Llama", {"embedding_multiplier": 12.0}, "embedding_multiplier=12.0 is not"),
        ("Llama", {"residual_multiplier": 0.22}, "residual_multiplier=0.22 is not"),
        ("Llama4", {"moe_layers": [1]}, r"moe_layers=\[1\]: these layers have experts"),
        (
            "Llama4",
            {"moe_layers": [], "rope_parameters": YARN},
            "an attention factor, which use_qk_norm=true undoes",
        ),
        (
            "Llama4",
            {
                "moe_layers": [],
                "attention_chunk_size": None,
                "layer_types": ["chunked_attention", FULL],
            },
            "attention_chunk_size is null",
        ),
        ("Llama4", {"moe_layers": [], "attention_chunk_size": 1}, "chunks below 2 keys"),
        ("Ministral3", {"rope_parameters": YARN}, "has no llama_4_scaling_beta, without which"),
        ("Llama", {"num_hidden_layers": 0}, "config.json describes no model"),
        ("Phi3", {}, "model_type=phi3 is none that can be imported"),
    ],
)
def test_what_our_model_does_not_support_is_refused_by_its_name(
    name: str, change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    written(tmp_path / "theirs", name, LLAMA | change)
    with pytest.raises(InteropError, match=words):
        import_model(tmp_path / "theirs", tmp_path / "run.yaml", tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


@pytest.mark.parametrize("kind", ["missing", "extra", "reshaped", "whole"])
def test_tensors_are_neither_guessed_nor_dropped(kind: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "theirs", "Llama", LLAMA)
    tensors = load_file(folder / "model.safetensors")
    if kind == "missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    elif kind == "extra":
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    elif kind == "reshaped":
        tensors["model.norm.weight"] = torch.ones(31)
    else:
        tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    words = {
        "missing": "has no model.layers.1.mlp.up_proj.weight",
        "extra": "has also model.layers.0.self_attn.q_proj.bias",
        "reshaped": "model.norm.weight has shape .31.",
        "whole": "model.norm.weight is torch.int32, not floating point",
    }[kind]
    with pytest.raises(MegahybridError, match=words):
        import_model(folder, tmp_path / "run.yaml", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_what_transformers_cannot_run_is_refused(tmp_path: Path) -> None:
    fields = {"layer_types": [FULL] * 2, "sliding_window": None, "tie_word_embeddings": True}
    written(tmp_path / "theirs", "Cohere2", LLAMA | fields)
    with pytest.raises(InteropError, match="cannot be run by transformers"):
        import_model(tmp_path / "theirs", tmp_path / "run.yaml", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
