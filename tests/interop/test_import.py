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
from megahybrid.commands.trained_model import load_trained_model
from megahybrid.config import check_run, load
from megahybrid.config.attention import Rope
from megahybrid.config.base import dump_yaml
from megahybrid.errors import ConfigError, InteropError, MegahybridError
from megahybrid.interop import hf_weights
from megahybrid.interop.architectures.table import of_model_type
from megahybrid.interop.export import export
from megahybrid.interop.import_model import import_model
from megahybrid.parallel.mesh import ParallelMesh
from tests.interop.examples import HEAD, NOPE, ROPE, model_of, run_of_model
from tests.train.example import write_data

SLIDING, FULL = "sliding_attention", "full_attention"
NAMES = (
    "Llama", "Qwen3", "SmolLM3", "Cohere2", "Olmo3", "Cohere", "Exaone4", "GraniteSWA",
    "CohereCompass", "ExaoneMoe", "Mellum", "Mistral", "Qwen2", "Afmoe",
    "Gemma3",
)  # fmt: skip
# Where a model of text is a part of another, whose config has the class's name.
CONFIGS = {"CohereCompass": "CohereCompassTextConfig", "Gemma3": "Gemma3TextConfig"}


@st.composite
def ropes(draw: st.DrawFn) -> dict[str, Any]:
    """A rotation in Hugging Face's words."""
    theta = {"rope_theta": draw(st.sampled_from((1e4, 5e5)))}
    original = {"original_max_position_embeddings": 64}
    return theta | draw(
        st.sampled_from(
            (
                {"rope_type": "default"},
                {"rope_type": "default"},
                {"rope_type": "linear", "factor": 3.0},
                {"rope_type": "yarn", "factor": 4.0, **original},
                {
                    "rope_type": "yarn",
                    "factor": 8.0,
                    "beta_fast": 16.0,
                    "mscale": 0.7,
                    "mscale_all_dim": 1.0,
                    **original,
                },
                {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    **original,
                },
            )
        )
    )


@st.composite
def configs(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """A tiny config of one class; windows below and above the lengths compared."""
    layers = draw(st.integers(1, 4))
    kv_heads = draw(st.sampled_from((1, 2)))
    rope = draw(ropes())
    config: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * draw(st.sampled_from((1, 2))),
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.sampled_from((8, 12))),
        "max_position_embeddings": 512,
        "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    eps = draw(st.sampled_from((1e-5, 1e-6)))
    config["layer_norm_eps" if name.startswith("Cohere") else "rms_norm_eps"] = eps
    types = draw(st.lists(st.sampled_from((SLIDING, FULL)), min_size=layers, max_size=layers))
    window = draw(st.sampled_from((2, 5, 200)))
    if name not in ("Llama", "Cohere"):
        config |= {"layer_types": types, "sliding_window": window}
    if name == "Mistral":
        del config["layer_types"]
        config["sliding_window"] = draw(st.sampled_from((window, None)))
    if name in ("SmolLM3", "Qwen3", "Qwen2"):
        config["use_sliding_window"] = True
    if name == "SmolLM3":
        config["no_rope_layers"] = draw(
            st.lists(st.integers(0, 1), min_size=layers, max_size=layers)
        )
    if name.startswith("Cohere"):
        config["logit_scale"] = draw(st.sampled_from((0.25, 1.0)))
    if name == "Cohere":
        config["use_qk_norm"] = draw(st.booleans())
    if name == "Exaone4" and draw(st.booleans()):
        config |= {"layer_types": [FULL] * layers, "sliding_window": None}
    if name in ("ExaoneMoe", "Mellum"):
        config["mlp_layer_types"] = ["dense"] * layers
    if name == "Afmoe":
        config |= {"num_dense_layers": layers, "mup_enabled": draw(st.booleans())}
    if name == "Gemma3":
        config["query_pre_attn_scalar"] = draw(st.sampled_from((config["head_dim"], 21)))
        config["final_logit_softcapping"] = draw(st.sampled_from((None, 0.75)))
    if name in ("Olmo3", "Mellum", "CohereCompass", "Gemma3"):
        config["rope_parameters"] = {SLIDING: {"rope_type": "default", "rope_theta": 1e4}}
        config["rope_parameters"][FULL] = rope
    if name == "CohereCompass" and draw(st.booleans()):
        config["rope_parameters"][draw(st.sampled_from((SLIDING, FULL)))] = None
    if name == "GraniteSWA":
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
        thetas = st.sampled_from((0, 1e4, 1e6))
        config["layer_rope_theta"] = draw(st.lists(thetas, min_size=layers, max_size=layers))
        config |= {"attention_multiplier": draw(st.sampled_from((0.3, config["head_dim"] ** -0.5)))}
        config["logits_scaling"] = draw(st.sampled_from((1.0, 4.0)))
    return config


def written(folder: Path, name: str, fields: dict[str, Any], dtype: str = "float32") -> Path:
    """A random model of a stock class, saved by transformers."""
    import transformers

    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, CONFIGS.get(name, f"{name}Config"))(**fields)
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "sinks" in parameter_name:
                parameter.fill_(-1e9)
            else:
                about = 0.0 if name == "Gemma3" else 1.0  # which adds 1 itself
                scale = 0.3 * noise + about if "norm" in parameter_name else 0.12 * noise
                parameter.copy_(scale)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


LLAMA: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


EXPERTS = {
    "mlp_layer_types": ["dense", "sparse"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}
KINDS = {"rope_parameters": dict.fromkeys((SLIDING, FULL), LLAMA["rope_parameters"])}


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_a_model_goes_in_and_out_again_to_the_bit(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp(name)
    fields = data.draw(configs(name))
    dtype, short = data.draw(st.sampled_from((("float32", "fp32"), ("bfloat16", "bf16"))))
    written(folder / "theirs", name, fields, dtype)
    import_model(folder / "theirs", folder / "run.yaml", folder / "ours")  # compares the logits
    verify(folder / "ours/checkpoints/step-00000000")
    export(folder / "ours", folder / "back", dtype=short, tokenizer="none", architecture=name)
    before = load_file(folder / "theirs/model.safetensors")
    after = load_file(folder / "back/model.safetensors")
    assert before.keys() == after.keys()
    for key in before:
        if name == "Gemma3" and "norm" in key and dtype == "float32":
            # Its class computes with 1 + w in fp32, and that has the same bits.
            assert torch.equal(1 + before[key], 1 + after[key])
        else:
            assert torch.equal(before[key], after[key])


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


def test_a_run_file_is_written_that_starts_from_the_import(tmp_path: Path) -> None:
    written(tmp_path / "theirs", "Llama", LLAMA)
    import_model(tmp_path / "theirs", tmp_path / "run.yaml", tmp_path / "ours")
    run = load(tmp_path / "run.yaml")
    check_run(run, 1)
    assert run.start is not None
    assert run.start.checkpoint == str(tmp_path / "ours")
    assert run.start.take == "weights"
    assert run.model.layer_plan.pattern == ["rope"]
    assert run.model.tie_embeddings is False


def test_an_import_without_a_place_goes_where_the_run_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "theirs", "Llama", LLAMA)
    import_model(Path("theirs"), Path("run.yaml"))
    assert load(Path("run.yaml")).start.checkpoint == "runs/run-imported"
    (tmp_path / "runs/run-imported").rename(tmp_path / "before")
    import_model(Path("theirs"), Path("run.yaml"))
    verify(tmp_path / "runs/run-imported/checkpoints/step-00000000")


def test_an_import_leaves_as_it_came_whatever_its_run_will_change(tmp_path: Path) -> None:
    written(tmp_path / "theirs", "Llama", LLAMA)
    model = model_of([ROPE] * 2, eps=1e-6, tie_embeddings=False, intermediate_size=40)
    run = run_of_model(model, "stages.0.schemes={layer0: {window: 128}}")
    (tmp_path / "run.yaml").write_text(dump_yaml(run))
    import_model(tmp_path / "theirs", tmp_path / "run.yaml", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", tokenizer="none")
    assert json.loads((tmp_path / "back/config.json").read_text())["model_type"] == "llama"


def test_a_run_file_of_another_model_is_refused_field_by_field(tmp_path: Path) -> None:
    written(tmp_path / "theirs", "Llama", LLAMA)
    model = model_of([ROPE, NOPE], eps=1e-6, tie_embeddings=False, vocab_size=62)
    (tmp_path / "run.yaml").write_text(dump_yaml(run_of_model(model)))
    with pytest.raises(ConfigError) as caught:
        import_model(tmp_path / "theirs", tmp_path / "run.yaml", tmp_path / "ours")
    assert str(caught.value).splitlines() == [
        "model.vocab_size=62 is not the source's (61). Set it to that.",
        "model.intermediate_size=48 is not the source's (40). Set it to that.",
        "model.layer_plan: layer 1 is nope, all keys, the source's is rope theta 10000, all keys. "
        f"Correct it, or mean it with --plan {tmp_path / 'run.yaml'}.",
    ]
    assert not (tmp_path / "ours").exists()


def test_surgery_says_what_is_exact_and_what_must_be_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path / "theirs", "Llama", LLAMA | {"num_hidden_layers": 4})
    schemes = [ROPE, ROPE | {"window": 128}, NOPE, {"position": {"kind": "rope", "theta": 5e5}}]
    sizes = {"eps": 1e-6, "tie_embeddings": False, "intermediate_size": 40}
    run = run_of_model(model_of(schemes, **sizes))
    (tmp_path / "run.yaml").write_text(dump_yaml(run))
    import_model(
        tmp_path / "theirs",
        tmp_path / "run.yaml",
        tmp_path / "ours",
        plan_file=tmp_path / "run.yaml",
    )
    lines = capsys.readouterr().out.splitlines()
    assert "layer 0: rope theta 10000, all keys: unchanged, exact" in lines
    assert (
        "layer 1: rope theta 10000, all keys -> rope theta 10000, window 128: exact up to 128 "
        "tokens; must learn to do without far keys"
    ) in lines
    assert any("layer 2: " in line and "order without rotation" in line for line in lines)
    assert any("layer 3: " in line and "other angles" in line for line in lines)
    manifest = verify(tmp_path / "ours/checkpoints/step-00000000")
    assert manifest.config["model"]["layer_plan"]["num_layers"] == 4
    assert manifest.config["model"]["layer_plan"]["schemes"]["layer1"]["window"] == 128


@torch.no_grad()
def test_what_surgery_calls_exact_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Windows alone change nothing before the first key falls out; and losses say where they do."""
    folder = written(tmp_path / "theirs", "Llama", LLAMA | {"vocab_size": 97})
    sizes = {"eps": 1e-6, "tie_embeddings": False, "intermediate_size": 40, "vocab_size": 97}
    run = run_of_model(model_of([ROPE | {"window": 20}, ROPE | {"window": 30}], **sizes))
    (tmp_path / "plan.yaml").write_text(dump_yaml(run))
    write_data(tmp_path)
    import_model(
        folder, tmp_path / "run.yaml", tmp_path / "ours", plan_file=tmp_path / "plan.yaml",
        data=tmp_path / "held",
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "window 20: exact up to 20 tokens" in said
    rows = [line.split() for line in said.splitlines() if "–" in line and line.count(".") == 2]
    assert [row[3] == row[5] for row in rows if row[0] in ("8", "16", "64")] == [True, False, False]
    ours = load_trained_model(tmp_path / "ours", ParallelMesh.single()).model
    tokens = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(4))
    from transformers import AutoModelForCausalLM

    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    error = (ours.logits(tokens) - wanted).abs().amax((0, 2)) / max(1, wanted.abs().max())
    assert error[:20].max() <= 1e-5 < 1e-3 < error[20]
    assert max(load(tmp_path / "run.yaml").stages[0].lengths) == 512  # as far as it was trained


def test_surgery_adds_no_parameters(tmp_path: Path) -> None:
    written(tmp_path / "theirs", "Llama", LLAMA)
    sizes = {"eps": 1e-6, "tie_embeddings": False, "intermediate_size": 40}
    run = run_of_model(model_of([ROPE | HEAD] * 2, **sizes))
    (tmp_path / "run.yaml").write_text(dump_yaml(run))
    with pytest.raises(ConfigError, match="Surgery changes positions, windows and scales"):
        import_model(
            tmp_path / "theirs",
            tmp_path / "run.yaml",
            tmp_path / "ours",
            plan_file=tmp_path / "run.yaml",
        )


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


@pytest.mark.parametrize("kind", ["missing", "extra", "reshaped", "whole", "sinks"])
def test_tensors_are_neither_guessed_nor_dropped(kind: str, tmp_path: Path) -> None:
    name = "GraniteSWA" if kind == "sinks" else "Llama"
    folder = written(tmp_path / "theirs", name, LLAMA)
    tensors = load_file(folder / "model.safetensors")
    if kind == "missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    elif kind == "extra":
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    elif kind == "reshaped":
        tensors["model.norm.weight"] = torch.ones(31)
    elif kind == "whole":
        tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int32)
    else:
        tensors["model.layers.1.self_attn.sinks"][2] = 0.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    words = {
        "missing": "has no model.layers.1.mlp.up_proj.weight",
        "extra": "has also model.layers.0.self_attn.q_proj.bias",
        "reshaped": "model.norm.weight has shape .31.",
        "whole": "model.norm.weight is torch.int32, not floating point",
        "sinks": "no attention sinks",
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
