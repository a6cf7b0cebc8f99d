"""Random models of transformers' own classes, as folders that transformers saved."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

pytest.importorskip(
    "transformers", reason="transformers is not installed: nothing to export to or import from"
)

SLIDING, FULL = "sliding_attention", "full_attention"
NAMES = (
    "Llama", "Qwen3", "SmolLM3", "Cohere2", "Olmo3", "Cohere", "Exaone4", "GraniteSWA",
    "CohereCompass", "ExaoneMoe", "Mellum", "Mistral", "Qwen2",
    "Llama4", "Ministral3", "Flint", "Afmoe", "Gemma3", "Olmo2",
)  # fmt: skip
# Where a model of text is a part of another, whose config has the class's name.
CONFIGS = {
    "CohereCompass": "CohereCompassTextConfig",
    "Gemma3": "Gemma3TextConfig",
    "Llama4": "Llama4TextConfig",
}


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
                # Llama 4 Scout's: a step without a blend.
                {
                    "rope_type": "llama3",
                    "factor": 16.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 1.0,
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
    if name not in ("Llama", "Cohere", "Olmo2"):
        config |= {"layer_types": types, "sliding_window": window}
    if name in ("Mistral", "Ministral3"):
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
    if name == "Flint":
        config |= draw(st.sampled_from(({"num_experts": 0}, {"mlp_only_layers": [*range(layers)]})))
    if name == "CohereCompass" and draw(st.booleans()):
        config["rope_parameters"][draw(st.sampled_from((SLIDING, FULL)))] = None
    if name == "Llama4":
        config |= draw(llama4_fields(layers))
        if config["use_qk_norm"] and rope["rope_type"] == "yarn":
            rope["attention_factor"] = 1.0
    if name == "Ministral3":
        scaled = draw(ropes().filter(lambda one: one["rope_type"] in ("yarn", "llama3")))
        scaled["original_max_position_embeddings"] = draw(st.sampled_from((4, 64)))
        scaled["llama_4_scaling_beta"] = draw(st.sampled_from((0.0, 0.1, 0.4)))
        config["rope_parameters"] = scaled
    if name == "GraniteSWA":
        thetas = st.sampled_from((0, 1e4, 1e6))
        config["layer_rope_theta"] = draw(st.lists(thetas, min_size=layers, max_size=layers))
        config |= {"attention_multiplier": draw(st.sampled_from((0.3, config["head_dim"] ** -0.5)))}
        config["logits_scaling"] = draw(st.sampled_from((1.0, 4.0)))
        config["embedding_multiplier"] = draw(st.sampled_from((1.0, 12.0)))
        config["residual_multiplier"] = draw(st.sampled_from((1, 0.22)))
    return config


@st.composite
def llama4_fields(draw: st.DrawFn, layers: int) -> dict[str, Any]:
    """What Llama 4's layers are told; chunks and floors below and above the lengths compared."""
    types = st.sampled_from(("chunked_attention", FULL))
    return {
        "moe_layers": [],
        "intermediate_size": 56,
        "intermediate_size_mlp": 40,
        "no_rope_layers": draw(st.lists(st.integers(0, 1), min_size=layers, max_size=layers)),
        "layer_types": draw(st.lists(types, min_size=layers, max_size=layers)),
        "attention_chunk_size": draw(st.sampled_from((2, 5, 200))),
        "use_qk_norm": draw(st.booleans()),
        "attn_temperature_tuning": draw(st.booleans()),
        "floor_scale": draw(st.sampled_from((3, 8192))),
        "attn_scale": draw(st.sampled_from((0.1, 0.4))),
    }


def written(
    folder: Path,
    name: str,
    fields: dict[str, Any],
    dtype: str = "float32",
    *,
    sinks: bool = False,
) -> Path:
    """A random model of a stock class, saved by transformers; its `sinks` take weight or none."""
    import transformers

    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, CONFIGS.get(name, f"{name}Config"))(**fields)
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "sinks" in parameter_name:
                parameter.copy_(1 + noise if sinks else torch.full_like(noise, -1e9))
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


@contextmanager
def no_word_of_transformers(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail where the library, whatever version is installed, warns or writes a note."""
    from transformers.utils import logging

    caplog.clear()
    logging.enable_propagation()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        logging.disable_propagation()
    assert [record.message for record in caplog.records if record.levelname != "INFO"] == []
