"""What leaves is the same function: transformers' own classes against the independent oracle."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megahybrid.config.model import ModelConfig
from megahybrid.errors import ConfigError, InteropError
from megahybrid.interop.architectures.cohere2 import Cohere2
from megahybrid.interop.architectures.smollm3 import SmolLM3
from megahybrid.interop.export import choose, export, inexact_rotations
from megahybrid.interop.logit_proof import quiet
from megahybrid.interop.model_card import evaluations_of
from tests.interop.examples import (
    HEAD,
    LOCAL,
    NOPE,
    PARALLEL,
    PER_HEAD,
    ROPE,
    WHOLE,
    checkpoint_of_model,
    model_of,
    output_of_card,
)
from tests.interop.stock_models import no_word_of_transformers
from tests.plain_model import PlainModel, random_tensors

BIASED = {"bias": "qkv"}
YARN = {"kind": "yarn", "factor": 4.0, "original_length": 64}
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_length": 64}
STEP = LLAMA3 | {"high_frequency_factor": 1.0}


def rope(theta: float = 1e4, scaling: Any = None, **more: Any) -> dict[str, Any]:
    return {"position": {"kind": "rope", "theta": theta, "scaling": scaling, **more}}


WEIGHTLESS = {"qk_norm": {"kind": "rms", "weight": "none"}}
TEMPERED = NOPE | {"score_scale": {"kind": "llama4", "floor": 8, "coefficient": 0.3}}
FROM_0 = rope(1e4, YARN) | {
    "score_scale": {"kind": "llama4", "floor": 64, "coefficient": 0.3, "offset": 0}
}
SINK = {"sink": True}
CASES: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "rnope_swa, parallel": (
        "Cohere2",
        [LOCAL, LOCAL, LOCAL, NOPE],
        {**PARALLEL, "logit_scale": 0.25},
    ),
    "rnope full, parallel": ("Cohere2", [NOPE, ROPE], PARALLEL),
    "qk_norm": ("Cohere", [ROPE | PER_HEAD] * 2, {**PARALLEL, "logit_scale": 0.0625}),
    "rope, parallel, head_dim of its own": ("Cohere", [ROPE] * 2, {**PARALLEL, "head_dim": 12}),
    "rnope_swa": ("SmolLM3", [LOCAL, LOCAL, LOCAL, NOPE], {}),
    "windowed nope": ("SmolLM3", [NOPE | {"window": 6}, ROPE], {"tie_embeddings": False}),
    "nope everywhere": ("SmolLM3", [NOPE] * 2, {}),
    "rope": ("Llama", [rope(5e5)] * 2, {"tie_embeddings": False, "eps": 1e-6}),
    "rope, llama3": ("Llama", [rope(1e4, LLAMA3)] * 2, {}),
    "rope, yarn": ("Llama", [rope(1e4, YARN)] * 2, {}),
    "rope, ntk": ("Llama", [rope(1e4, {"kind": "ntk", "factor": 4.0})] * 2, {}),
    "one window": ("Mistral", [LOCAL] * 2, {"head_dim": 12}),
    "biases, swa": (
        "Qwen2",
        [LOCAL | BIASED, ROPE | BIASED],
        {"head_dim": 12, "tie_embeddings": False},
    ),
    "biases, nope everywhere": ("Qwen2", [NOPE | BIASED] * 2, {}),
    "biases in some layers, parallel": (
        "Megahybrid",
        [LOCAL | BIASED, NOPE | BIASED | HEAD, ROPE],
        PARALLEL,
    ),
    "swa, QK-norm": ("Qwen3", [LOCAL | HEAD, ROPE | HEAD], {}),
    "nope everywhere, QK-norm": ("Qwen3", [NOPE | HEAD] * 2, {}),
    "post-norm": ("Exaone4", [LOCAL | HEAD, NOPE | HEAD], {"block": "post_norm"}),
    "post-norm, rope": ("Exaone4", [ROPE | HEAD] * 2, {"block": "post_norm"}),
    "post-norm, projection": (
        "Olmo3",
        [LOCAL | WHOLE, rope(1e6, YARN) | WHOLE],
        {"block": "post_norm"},
    ),
    "post-norm, projection, rope": (
        "Olmo2",
        [rope(5e5, YARN) | WHOLE] * 2,
        {"block": "post_norm", "tie_embeddings": False, "head_dim": 12},
    ),
    "post-norm, projection, nope": (
        "Olmo3",
        [ROPE | WHOLE, NOPE | WHOLE],
        {"block": "post_norm"},
    ),
    "sandwich, gate, QK-norm": (
        "Afmoe",
        [LOCAL | HEAD | {"gate": "element"}, NOPE | HEAD | {"gate": "element"}],
        {"block": "sandwich", "tie_embeddings": False},
    ),
    "sandwich, gates of both kinds": (
        "Megahybrid",
        [LOCAL | {"gate": "head"}, NOPE | {"gate": "element"}],
        {"block": "sandwich", "norm": "layernorm"},
    ),
    "sandwich, QK-norm, GeGLU": (
        "Gemma3",
        [LOCAL | HEAD, rope(1e6, {"kind": "linear", "factor": 8.0}) | HEAD],
        {
            "block": "sandwich",
            "activation": "gelu_tanh",
            "embedding_scale": 32**0.5,
            "logit_softcap": 0.5,
            "tie_embeddings": False,
        },
    ),
    "multipliers": (
        "Megahybrid",
        [LOCAL, NOPE],
        {
            "embedding_scale": 3.0,
            "residual_scale": 0.4,
            "logit_softcap": 0.5,
            "activation": "gelu_tanh",
            "logit_scale": 0.5,
        },
    ),
    "theta per kind, parallel": ("CohereCompass", [LOCAL, rope(1e6)], PARALLEL),
    "windowed nope, parallel, head_dim of its own": (
        "CohereCompass",
        [NOPE | {"window": 6}, rope(1e4, YARN)],
        {**PARALLEL, "logit_scale": 0.25, "head_dim": 12, "tie_embeddings": False},
    ),
    "QK-norm, pre-norm, rnope": (
        "ExaoneMoe",
        [LOCAL | HEAD, NOPE | HEAD],
        {"tie_embeddings": False},
    ),
    "QK-norm, pre-norm, rnope full": ("ExaoneMoe", [ROPE | HEAD, NOPE | HEAD], {}),
    "QK-norm, pre-norm, theta per kind": ("Mellum", [LOCAL | HEAD, rope(1e6, YARN) | HEAD], {}),
    "QK-norm, pre-norm, windowed nope": (
        "Mellum",
        [NOPE | HEAD | {"window": 6}, ROPE | HEAD],
        {"head_dim": 12, "tie_embeddings": False},
    ),
    "chunks, weightless QK-norm, temperature": (
        "Llama4",
        [ROPE | {"chunk": 5} | WEIGHTLESS, ROPE | WEIGHTLESS, TEMPERED],
        {"tie_embeddings": False},
    ),
    "chunks, a step of llama3 scaling": (
        "Llama4",
        [rope(1e4, STEP) | {"chunk": 5} | WEIGHTLESS, NOPE],
        {"tie_embeddings": False},
    ),
    "chunks without rotation, part of a head": (
        "Llama4",
        [NOPE | {"chunk": 6}, rope(1e4, rotary_fraction=0.5)],
        {},
    ),
    "temperature from 0 beside yarn": ("Ministral3", [FROM_0 | {"window": 6}] * 2, {}),
    "theta per layer": ("GraniteSWA", [LOCAL, rope(1e6), NOPE], {"logit_scale": 0.5}),
    "theta per layer, one scaling, multipliers": (
        "GraniteSWA",
        [rope(1e4, YARN) | {"window": 5}, rope(1e6, YARN), NOPE],
        {"embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 0.5},
    ),
    "theta per layer, parts of heads": (
        "GraniteSWA",
        [rope(theta, rotary_fraction=0.5, spectrum="head") for theta in (1e4, 1e6)],
        {"residual_scale": 0.22},
    ),
    "theta per layer, no window": ("GraniteSWA", [rope(1e4), rope(1e6), NOPE], {}),
    "learned sinks": ("GraniteSWA", [LOCAL | SINK, rope(1e6) | SINK, NOPE], {}),
    "learned sinks, QK-norm": ("Flint", [LOCAL | HEAD | SINK, NOPE | HEAD | SINK], {}),
    "learned sinks in a parallel block": ("Megahybrid", [LOCAL | SINK, NOPE | SINK], PARALLEL),
    "fixed scale": (
        "GraniteSWA",
        [LOCAL | {"score_scale": {"kind": "fixed", "scale": 0.3}}] * 2,
        {"head_dim": 12},
    ),
    "two windows": ("Megahybrid", [LOCAL, ROPE | {"window": 9}, NOPE], {}),
    "QK-norm on one kind of layers": ("Megahybrid", [LOCAL | HEAD, NOPE], {}),
    "ssmax and log": (
        "Megahybrid",
        [
            LOCAL | {"score_scale": {"kind": "ssmax"}},
            NOPE | {"score_scale": {"kind": "log", "base": 3.0}},
        ],
        {"block": "post_norm", "norm": "layernorm"},
    ),
    "llama4, theta per layer, parallel": (
        "Megahybrid",
        [
            LOCAL | PER_HEAD,
            NOPE | WHOLE | {"score_scale": {"kind": "llama4", "floor": 8, "coefficient": 0.3}},
            rope(1e6, YARN) | {"window": 30},
        ],
        {**PARALLEL, "logit_scale": 0.5, "tie_embeddings": False},
    ),
    "partial rotation, scaled": (
        "Megahybrid",
        [rope(1e4, {"kind": "linear", "factor": 3.0}, rotary_fraction=0.5)] * 2,
        {},
    ),
}


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet():
        return AutoModelForCausalLM.from_pretrained(
            str(folder), trust_remote_code=True, dtype=torch.float32, local_files_only=True
        ).eval()


def exported(
    folder: Path, model: ModelConfig, **options: Any
) -> tuple[Any, dict[str, torch.Tensor]]:
    """The export of a random model, loaded, and the weights that went in."""
    tensors = random_tensors(model, 3, dtype=torch.float32, std=0.12)
    checkpoint_of_model(folder / "run", model, tensors=tensors)
    export(folder / "run", folder / "out", tokenizer="none", **options)
    return loaded(folder / "out"), tensors


@torch.no_grad()
def error(theirs: Any, model: ModelConfig, tensors: Any, length: int) -> tuple[float, float]:
    """The largest difference from the oracle, and the bound."""
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(model.vocab_size, (2, length), generator=generator)
    wanted = PlainModel(model, tensors).logits(tokens)
    found = theirs(input_ids=tokens).logits
    return (found - wanted).abs().max().item(), 1e-5 * max(1.0, wanted.abs().max().item())


@pytest.mark.parametrize("case", CASES)
def test_an_export_is_the_plain_model(case: str, tmp_path: Path) -> None:
    name, schemes, fields = CASES[case]
    model = model_of(schemes, **fields)
    assert choose(model, model.layer_plan, None).name == name
    theirs, tensors = exported(tmp_path, model)
    assert type(theirs).__name__ == f"{name}ForCausalLM"
    for length in (3, 40):
        found, bound = error(theirs, model, tensors, length)
        assert found <= bound


def test_a_partial_rotation_is_exported_only_to_the_bit(tmp_path: Path) -> None:
    model = model_of([rope(1e4, rotary_fraction=0.5)] * 2, **PARALLEL)
    inexact = inexact_rotations(model.layer_plan, model.head_dim)
    assert choose(model, model.layer_plan, None).name == ("Megahybrid" if inexact else "Cohere")
    theirs, tensors = exported(tmp_path, model)
    found, bound = error(theirs, model, tensors, 40)
    assert found <= bound


@st.composite
def fields(draw: st.DrawFn) -> dict[str, Any]:
    """Of any tiny model that the config language has (windows of two keys or more)."""
    kv_heads = draw(st.sampled_from((1, 2, 3)))
    heads = kv_heads * draw(st.sampled_from((1, 2)))
    norm = draw(st.sampled_from(({}, {}, HEAD, WHOLE, PER_HEAD)))
    scalings = (None, None, YARN, LLAMA3, {"kind": "linear", "factor": 2.0})
    thetas = draw(st.sampled_from(((1e4,), (5e4,), (1e4, 1e6))))
    windows = draw(st.sampled_from(((None,), (5,), (5, None), (60, None), (2, None), (4, 7))))
    scaling = draw(st.sampled_from(scalings))
    schemes = []
    for _ in range(draw(st.integers(1, 4))):
        position = NOPE
        if draw(st.booleans()):
            position = rope(draw(st.sampled_from(thetas)), scaling)
        schemes.append(position | norm | {"window": draw(st.sampled_from(windows))})
    return dict(
        schemes=schemes,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from((4, 8, 10))),
        hidden_size=draw(st.sampled_from((24, 32))),
        block=draw(st.sampled_from(("pre_norm", "post_norm", "sandwich", "parallel"))),
        norm=draw(st.sampled_from(("rms", "layernorm"))),
        logit_scale=draw(st.sampled_from((1.0, 0.25))),
        tie_embeddings=draw(st.booleans()),
        eps=draw(st.sampled_from((1e-5, 1e-6))),
    )


@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(drawn=fields())
def test_any_model_is_exported_to_the_bound(
    drawn: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = model_of(**drawn)
    theirs, tensors = exported(tmp_path_factory.mktemp("any"), model)
    for length in (3, 33):
        found, bound = error(theirs, model, tensors, length)
        assert found <= bound


def test_a_wrong_permutation_is_refused_and_its_layer_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of([NOPE, LOCAL, LOCAL, NOPE], **PARALLEL)
    checkpoint_of_model(tmp_path / "run", model)
    monkeypatch.setattr(Cohere2, "row_order", lambda *arguments: None)
    with pytest.raises(InteropError, match="layer 1 is the first that differs"):
        export(tmp_path / "run", tmp_path / "out", tokenizer="none")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("field", ["sliding_window", "rope_parameters", "layer_types"])
def test_a_wrong_config_is_refused(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {
        "sliding_window": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1.1e4},
        "layer_types": ["full_attention"] * 2,
    }[field]
    checkpoint_of_model(tmp_path / "run", model_of([LOCAL, NOPE]))
    right = SmolLM3.layer_fields
    monkeypatch.setattr(SmolLM3, "layer_fields", lambda *given: right(*given) | {field: wrong})
    with pytest.raises(InteropError, match="Nothing was published"):
        export(tmp_path / "run", tmp_path / "out", tokenizer="none")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wanted", "schemes", "words"),
    [
        (
            "llama",
            [LOCAL, NOPE],
            "Llama does not support this model: it rotates in every layer or in",
        ),
        ("Cohere2", [LOCAL, NOPE], "its block is parallel, not pre_norm"),
        ("Qwen3", [LOCAL, ROPE], "its QK-norm is rms per head, weight shared, not none"),
        ("SmolLM3", [LOCAL, ROPE | {"window": 9}], "it has one window, not 2. Use Megahybrid"),
        ("Lama", [ROPE], "Did you mean 'Llama'?"),
        (None, [ROPE | {"window": 1}], "a window of 1 key"),
    ],
)
def test_what_a_class_does_not_support_is_refused_by_its_name(
    wanted: str | None, schemes: Any, words: str, tmp_path: Path
) -> None:
    checkpoint_of_model(tmp_path / "run", model_of(schemes))
    with pytest.raises(ConfigError) as caught:
        export(tmp_path / "run", tmp_path / "out", architecture=wanted, tokenizer="none")
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_our_own_class_can_be_asked_for(tmp_path: Path) -> None:
    model = model_of([LOCAL, NOPE])
    theirs, tensors = exported(tmp_path, model, architecture="megahybrid")
    assert type(theirs).__name__ == "MegahybridForCausalLM"
    found, bound = error(theirs, model, tensors, 40)
    assert found <= bound


def test_shards_hold_the_weights_rounded_once(tmp_path: Path) -> None:
    model = model_of([LOCAL | PER_HEAD | {"window": None}] * 2, **PARALLEL)
    tensors = random_tensors(model, 3, dtype=torch.float32)
    checkpoint_of_model(tmp_path / "run", model, tensors=tensors)
    export(tmp_path / "run", tmp_path / "out", dtype="bf16", shard_bytes=8000, tokenizer="none")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = {name: load_file(tmp_path / "out" / name) for name in set(index["weight_map"].values())}
    assert len(files) > 3
    held = {name: files[file][name] for name, file in index["weight_map"].items()}
    total = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
    assert index["metadata"]["total_size"] == total
    value = held["model.layers.1.self_attn.v_proj.weight"]
    assert value.dtype == torch.bfloat16
    assert torch.equal(value, tensors["blocks.1.attention.value.weight"].bfloat16())
    query = held["model.layers.1.self_attn.q_proj.weight"].unflatten(0, (4, 8))
    ours = tensors["blocks.1.attention.query.weight"].bfloat16().unflatten(0, (4, 8))
    assert torch.equal(query[:, ::2], ours[:, :4])
    assert torch.equal(query[:, 1::2], ours[:, 4:])
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_an_export_never_replaces_anything(tmp_path: Path) -> None:
    checkpoint_of_model(tmp_path / "run", model_of([ROPE]))
    (tmp_path / "out").mkdir()
    with pytest.raises(InteropError, match="exists"):
        export(tmp_path / "run", tmp_path / "out", tokenizer="none")


def test_the_card_has_a_place_for_a_loss_that_is_no_number(tmp_path: Path) -> None:
    events = [
        {"kind": "event", "event": "evaluate", "step": 5, "stage": "a", "tokens": 9,
         "detail": {"set": "held", "length": 64, "loss": loss, "tokens": 1000},
         "attempt": 1, "time_unix": 1.0}
        for loss in (None, 2.5)
    ]  # fmt: skip
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    rows = evaluations_of(tmp_path / "checkpoints" / "step-00000005", 5)[2:]
    assert sorted(rows) == ["| held | 64 | 2.5000 | 1,000 |", "| held | 64 | – | 1,000 |"]


def test_a_name_in_the_card_ends_no_cell_and_is_no_html(tmp_path: Path) -> None:
    name = "a|b<img src=x onerror=x>[c](javascript:x)`d`\n# e\x1b"
    event = {"kind": "event", "event": "evaluate", "step": 5, "stage": "a", "tokens": 9,
             "detail": {"set": name, "length": 64, "loss": 2.5, "tokens": 1000},
             "attempt": 1, "time_unix": 1.0}  # fmt: skip
    (tmp_path / "ledger.jsonl").write_text(json.dumps(event) + "\n")
    (row,) = evaluations_of(tmp_path / "checkpoints" / "step-00000005", 5)[2:]
    assert row == (
        r"| a\|b\<img src=x onerror=x\>\[c\](javascript:x)\`d\`\\n# e\\x1b "
        "| 64 | 2.5000 | 1,000 |"
    )


def test_the_card_tells_the_plan_and_the_proof(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint_of_model(tmp_path / "run", model_of([LOCAL, LOCAL, LOCAL, NOPE]))
    export(tmp_path / "run", tmp_path / "out", tokenizer="none")
    card = (tmp_path / "out/README.md").read_text()
    with no_word_of_transformers(caplog):
        assert len(output_of_card(tmp_path / "out")[0]) == 3 + 32  # the card's program generates
    assert "| 3 | layer3 | nope | - | all |" in card
    assert "| short | 802,816 | 256 (1) |" in card
    assert "| whole | 96 |" in card
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["use_sliding_window"] is True
    assert config["sliding_window"] == 5
    assert config["no_rope_layers"] == [1, 1, 1, 0]
    assert config["max_position_embeddings"] == 256  # of the stages begun, not of the run's
