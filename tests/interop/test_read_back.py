"""What an export wrote, or an import, is read back whole: what no logit shows is refused too."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megahybrid.errors import InteropError, MegahybridError
from megahybrid.interop import export as exporting
from megahybrid.interop import hf_weights, shards
from megahybrid.interop.export import export
from megahybrid.interop.import_model import import_model
from tests.interop.examples import LOCAL, NOPE, PARALLEL, ROPE, checkpoint_of_model, model_of
from tests.plain_model import random_tensors

Tensors = dict[str, torch.Tensor]
Fault = Callable[[Path], None]


def _in_shards(change: Callable[[Tensors], None]) -> Fault:
    """A fault in the tensors of a folder, whichever file holds them."""

    def spoil(folder: Path) -> None:
        files = {path: load_file(path) for path in folder.glob("*.safetensors")}
        together = {name: tensor for held in files.values() for name, tensor in held.items()}
        change(together)
        for path, held in files.items():
            save_file({name: together[name] for name in held}, path, {"format": "pt"})

    return spoil


def _in_json(file: str, change: Callable[[dict[str, Any]], None]) -> Fault:
    def spoil(folder: Path) -> None:
        fields = json.loads((folder / file).read_text())
        change(fields)
        (folder / file).write_text(json.dumps(fields, indent=2) + "\n")

    return spoil


def _zero_rows(tensors: Tensors) -> None:
    tensors["model.embed_tokens.weight"][900:1000] = 0


def _transpose(tensors: Tensors) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = tensors[name].T.contiguous()


def _swap_norms(tensors: Tensors) -> None:
    a, b = (f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1))
    tensors[a], tensors[b] = tensors[b], tensors[a]


def _one_bit(tensors: Tensors) -> None:
    row = tensors["lm_head.weight"][1_999].view(torch.int32)
    row[-1] ^= 1


def _minus_zero(tensors: Tensors) -> None:
    tensors["model.norm.weight"].view(torch.int32)[3] = -(2**31)


def _two_numbers(fields: dict[str, Any]) -> None:
    fields["max_position_embeddings"] = 4096
    fields["eos_token_id"] = 7


def _theta(fields: dict[str, Any]) -> None:
    fields["rope_parameters"]["rope_theta"] = 10000.1


FAULTS: dict[str, tuple[Fault, str]] = {
    "100 rows of an embedding": (
        _in_shards(_zero_rows),
        "model.embed_tokens.weight is not .* embedding.weight: 100 of rows .* row 900 first",
    ),
    "a transposed matrix": (_in_shards(_transpose), "layers.1.self_attn.q_proj.weight is not"),
    "norms of two layers": (_in_shards(_swap_norms), "layers.0.input_layernorm.weight is not"),
    "one bit of the head": (_in_shards(_one_bit), "1 of rows 0 to 1999 differ, row 1999 first"),
    "minus zero": (_in_shards(_minus_zero), "model.norm.weight is not"),
    "a tensor left out": (
        lambda folder: _drop(folder, "model.layers.0.mlp.up_proj.weight"),
        "has no model.layers.0.mlp.up_proj.weight",
    ),
    "the longest text": (
        _in_json("config.json", lambda fields: fields.update(max_position_embeddings=512)),
        "max_position_embeddings=512 instead of 256",
    ),
    "where a text ends": (
        _in_json("config.json", lambda fields: fields.update(eos_token_id=7)),
        "eos_token_id=7 instead of None",
    ),
    "where generated text ends": (
        _in_json("generation_config.json", lambda fields: fields.update(eos_token_id=7)),
        "generation_config.json is not what was written: eos_token_id=7 instead of None",
    ),
    "two fields": (
        _in_json("config.json", _two_numbers),
        "eos_token_id=7 instead of None; max_position_embeddings=4096",
    ),
    "theta": (_in_json("config.json", _theta), "not the same fp32 bits"),
    "a field more": (
        _in_json("config.json", lambda fields: fields.update(attention_chunk_size=8)),
        "attention_chunk_size=8 instead of None",
    ),
}


def _drop(folder: Path, name: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_between_writing_and_proof_is_refused(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of([LOCAL, NOPE], vocab_size=2000, tie_embeddings=False)
    checkpoint_of_model(tmp_path / "run", model)
    spoil, words = FAULTS[fault]
    right = exporting.prove

    def after_a_fault(model: Any, plan: Any, checkpoint: Path, folder: Path, **named: Any) -> Any:
        spoil(folder)
        return right(model, plan, checkpoint, folder, **named)

    monkeypatch.setattr(exporting, "prove", after_a_fault)
    with pytest.raises(InteropError, match=words):
        export(tmp_path / "run", tmp_path / "out", tokenizer="none")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("file", ["modeling_megahybrid.py", "config.json"])
def test_code_or_fields_that_change_unseen_are_refused(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint_of_model(tmp_path / "run", model_of([LOCAL, ROPE | {"window": 9}]))
    right = exporting.prove

    def before_a_fault(model: Any, plan: Any, checkpoint: Path, folder: Path, **named: Any) -> Any:
        rows = right(model, plan, checkpoint, folder, **named)
        path = folder / file
        path.write_text(path.read_text() + "\n")
        return rows

    monkeypatch.setattr(exporting, "prove", before_a_fault)
    with pytest.raises(InteropError, match=f"{file} is not what was written: its text differs"):
        export(tmp_path / "run", tmp_path / "out", tokenizer="none")


def test_a_wrong_length_or_end_that_was_written_so_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint_of_model(tmp_path / "run", model_of([LOCAL, NOPE]))
    for name in ("max_position_embeddings", "eos_token_id"):
        monkeypatch.setattr(
            exporting.json,  # what is written differs from what was meant
            "dumps",
            lambda fields, name=name, **named: json.JSONEncoder(**named).encode(
                fields | ({name: 5} if name in fields else {})
            ),
        )
        with pytest.raises(InteropError, match=f"transformers reads {name}=5 in config.json"):
            export(tmp_path / "run", tmp_path / "out", tokenizer="none")


def test_weights_kept_in_another_dtype_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint_of_model(tmp_path / "run", model_of([LOCAL, NOPE]))
    right = exporting.write_shards

    def wider(folder: Path, *given: Any) -> int:
        size = right(folder, *given)
        path = folder / "model.safetensors"
        wide = {name: tensor.float() for name, tensor in load_file(path).items()}
        save_file(wide, path, {"format": "pt"})
        return size

    monkeypatch.setattr(exporting, "write_shards", wider)
    with pytest.raises(InteropError, match="is F32 in its file, not BF16"):
        export(tmp_path / "run", tmp_path / "out", tokenizer="none", dtype="bf16")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_import_that_loses_rows_is_refused(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of([LOCAL, NOPE], vocab_size=2000, **PARALLEL)
    checkpoint_of_model(tmp_path / "run", model)
    export(tmp_path / "run", tmp_path / "theirs", tokenizer="none", dtype=dtype)
    right = hf_weights.Band.__array__

    def lossy(self: hf_weights.Band, *given: Any, **named: Any) -> np.ndarray:
        values = right(self, *given, **named)
        if self.name.ours == "embedding.weight":
            values = values.copy()
            values[900 * self.row : 1000 * self.row] = 0
        return values

    monkeypatch.setattr(hf_weights.Band, "__array__", lossy)
    with pytest.raises(InteropError, match="100 of rows .* row 900 first"):
        import_model(tmp_path / "theirs", tmp_path / "run.yaml", tmp_path / "ours")
    assert not (tmp_path / "ours").exists() and not (tmp_path / "run.yaml").exists()


@pytest.mark.parametrize("same", [True, False])
def test_a_head_beside_tied_embeddings_must_be_the_embedding(same: bool, tmp_path: Path) -> None:
    checkpoint_of_model(tmp_path / "run", model_of([LOCAL, NOPE]))
    export(tmp_path / "run", tmp_path / "theirs", tokenizer="none")
    path = tmp_path / "theirs/model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][60] *= 1 if same else 1 + 1e-6
    save_file(tensors, path, {"format": "pt"})
    if same:
        import_model(tmp_path / "theirs", tmp_path / "run.yaml", tmp_path / "ours")
    else:
        with pytest.raises(InteropError, match="lm_head.weight is not .* row 60 first"):
            import_model(tmp_path / "theirs", tmp_path / "run.yaml", tmp_path / "ours")


def test_bits_are_compared_a_band_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bands of seven rows, or of one head where rows are reordered: memory does not grow."""
    monkeypatch.setattr(shards, "BAND_BYTES", 32 * 4 * 7)
    checkpoint_of_model(tmp_path / "run", model_of([LOCAL, NOPE], **PARALLEL))
    most = 0
    right = hf_weights.ForeignWeights.rows

    def counted(self: Any, name: str, start: int, stop: int) -> np.ndarray:
        nonlocal most
        most = max(most, stop - start)
        return right(self, name, start, stop)

    monkeypatch.setattr(hf_weights.ForeignWeights, "rows", counted)
    export(tmp_path / "run", tmp_path / "out", tokenizer="none")
    assert most == 32  # a norm's weight, of one number a row


def test_a_single_file_is_taken_before_an_index_as_transformers_does(tmp_path: Path) -> None:
    checkpoint_of_model(tmp_path / "run", model_of([LOCAL, NOPE]))
    export(tmp_path / "run", tmp_path / "one", tokenizer="none")
    export(tmp_path / "run", tmp_path / "many", tokenizer="none", shard_bytes=8000)
    single = tmp_path / "one/model.safetensors"
    tensors = load_file(single)
    tensors["model.embed_tokens.weight"][40:] *= 2
    save_file(tensors, tmp_path / "many/model.safetensors", {"format": "pt"})
    with hf_weights.ForeignWeights(tmp_path / "many") as weights:
        found = torch.from_numpy(weights.rows("model.embed_tokens.weight", 0, 61).copy())
    assert torch.equal(found, tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_either_way(value: float, tmp_path: Path) -> None:
    """In a row of an embedding that no id drawn for the logits touches."""
    model = model_of([LOCAL, NOPE], vocab_size=3000, tie_embeddings=False)
    checkpoint_of_model(tmp_path / "run", model)
    export(tmp_path / "run", tmp_path / "theirs", tokenizer="none")
    path = tmp_path / "theirs/model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][2900, 3] = value
    save_file(tensors, path, {"format": "pt"})
    words = "embed_tokens.weight holds what is no finite number in 1 of rows .* row 2900 first"
    with pytest.raises(InteropError, match=words):
        import_model(tmp_path / "theirs", tmp_path / "run.yaml", tmp_path / "ours")
    weights = random_tensors(model, 3, dtype=torch.float32, std=0.15)
    weights["embedding.weight"].data[2900, 3] = value
    checkpoint_of_model(tmp_path / "spoiled", model, tensors=weights)
    with pytest.raises(InteropError, match=words):
        export(tmp_path / "spoiled", tmp_path / "out", tokenizer="none")
    names = {"run", "theirs", "spoiled"}
    assert {entry.name for entry in tmp_path.iterdir()} == names


@pytest.mark.parametrize("exact", [True, False])
def test_numbers_that_fp32_does_not_have_are_not_rounded_unseen(
    exact: bool, tmp_path: Path
) -> None:
    checkpoint_of_model(tmp_path / "run", model_of([LOCAL, NOPE], tie_embeddings=False))
    export(tmp_path / "run", tmp_path / "theirs", tokenizer="none")
    path = tmp_path / "theirs/model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].double()
    tensors["lm_head.weight"][60, 3] *= 1 if exact else 1 + 1e-9
    save_file(tensors, path, {"format": "pt"})
    if exact:
        import_model(tmp_path / "theirs", tmp_path / "run.yaml", tmp_path / "ours")
    else:
        with pytest.raises(
            MegahybridError, match="lm_head.weight is float64 and holds numbers that"
        ):
            import_model(tmp_path / "theirs", tmp_path / "run.yaml", tmp_path / "ours")
        assert not (tmp_path / "ours").exists()
