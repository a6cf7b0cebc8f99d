"""The oracle itself against the code of published models, fp32, longer than the window."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig
from tests.plain_model import PlainModel, canonical_shapes, query_factor, relative_error
from tests.plain_training import random_batch

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: nothing independent to compare with"
)

SEQ, VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, WINDOW = 24, 61, 64, 4, 2, 16, 96, 5

ROPE = {"position": {"kind": "rope", "theta": 10000.0}}
LOCAL = ROPE | {"window": WINDOW}
NOPE = {"position": {"kind": "nope"}}
PER_HEAD = {"qk_norm": {"kind": "rms", "over": "head", "weight": "shared"}}
WHOLE = {"qk_norm": {"kind": "rms", "over": "projection"}}
SSSF = ["sliding_attention"] * 3 + ["full_attention"]

SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 4096,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def scaled(**rope: Any) -> dict[str, Any]:
    """Hugging Face's spelling of a scaled rotation at theta 1e4."""
    return {"rope_parameters": {"rope_theta": 10000.0, **rope}}


YARN = {"kind": "yarn", "factor": 4.0, "original_length": 64}
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_length": 64}

# name: (class stem, its config, our schemes by layer, our other fields)
CASES: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]], dict[str, Any]]] = {
    "llama": ("Llama", {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}, [ROPE] * 4, {}),
    "llama-linear": (
        "Llama",
        {"rms_norm_eps": 1e-6, "tie_word_embeddings": True}
        | scaled(rope_type="linear", factor=3.0),
        [{"position": ROPE["position"] | {"scaling": {"kind": "linear", "factor": 3.0}}}] * 4,
        {},
    ),
    "llama-yarn": (
        "Llama",
        {"rms_norm_eps": 1e-6, "tie_word_embeddings": True}
        | scaled(rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
        [{"position": ROPE["position"] | {"scaling": YARN}}] * 4,
        {},
    ),
    "llama-llama3": (
        "Llama",
        {"rms_norm_eps": 1e-6, "tie_word_embeddings": True}
        | scaled(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
        [{"position": ROPE["position"] | {"scaling": LLAMA3}}] * 4,
        {},
    ),
    "llama-ntk": (
        "Llama",
        {
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0 * 4.0 ** (HEAD_DIM / (HEAD_DIM - 2)),
            },
        },
        [{"position": ROPE["position"] | {"scaling": {"kind": "ntk", "factor": 4.0}}}] * 4,
        {},
    ),
    "cohere2": (
        "Cohere2",
        {
            "layer_types": SSSF,
            "sliding_window": WINDOW,
            "logit_scale": 0.25,
            "layer_norm_eps": 1e-5,
        },
        [LOCAL, LOCAL, LOCAL, NOPE],
        {"block": "parallel", "norm": "layernorm", "logit_scale": 0.25},
    ),
    "cohere-qk_norm": (
        "Cohere",
        {"use_qk_norm": True, "logit_scale": 0.0625, "layer_norm_eps": 1e-5},
        [ROPE | {"qk_norm": {"kind": "layernorm", "over": "head", "weight": "per_head"}}] * 4,
        {"block": "parallel", "norm": "layernorm", "logit_scale": 0.0625},
    ),
    "smollm3-rnope_swa": (
        "SmolLM3",
        {
            "layer_types": SSSF,
            "sliding_window": WINDOW,
            "use_sliding_window": True,
            "no_rope_layers": [1, 1, 1, 0],
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
        },
        [LOCAL, LOCAL, LOCAL, NOPE],
        {},
    ),
    "qwen3-window": (
        "Qwen3",
        {
            "layer_types": SSSF,
            "sliding_window": WINDOW,
            "use_sliding_window": True,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
        },
        [LOCAL | PER_HEAD] * 3 + [ROPE | PER_HEAD],
        {},
    ),
    "exaone4-rnope_swa": (
        "Exaone4",
        {
            "layer_types": SSSF,
            "sliding_window": WINDOW,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
        [LOCAL | PER_HEAD] * 3 + [NOPE | PER_HEAD],
        {"block": "post_norm"},
    ),
    "olmo3": (
        "Olmo3",
        {
            "layer_types": SSSF,
            "sliding_window": WINDOW,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            },
        },
        [LOCAL | WHOLE] * 3 + [{"position": {"kind": "rope", "theta": 1e6}} | WHOLE],
        {"block": "post_norm"},
    ),
}


def published(stem: str, fields: dict[str, Any]) -> Any:
    """A tiny random model of a stock class in which every weight matters."""
    config = getattr(transformers, f"{stem}Config")(**(SHARED | fields))
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{stem}ForCausalLM")(config).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.15 * noise)
    return model


def ours(
    stem: str, fields: dict[str, Any], schemes: list[Any], more: dict[str, Any]
) -> ModelConfig:
    """The same model in our words."""
    eps = fields.get("rms_norm_eps", fields.get("layer_norm_eps"))
    return ModelConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        eps=eps,
        tie_embeddings=fields.get("tie_word_embeddings", True),
        layer_plan=LayerPlan.model_validate(
            {
                "num_layers": 4,
                "pattern": [f"layer{index}" for index in range(4)],
                "schemes": {f"layer{index}": scheme for index, scheme in enumerate(schemes)},
            }
        ),
        **more,
    )


def half_split(weight: Tensor) -> Tensor:
    """Rows of heads stored as pairs (2i, 2i + 1) reordered to (i, i + head_dim / 2)."""
    order = torch.cat([torch.arange(0, HEAD_DIM, 2), torch.arange(1, HEAD_DIM, 2)])
    if weight.shape[-1] == HEAD_DIM and weight.dim() == 2 and weight.shape[0] <= HEADS:
        return weight[:, order]  # a QK-norm weight [heads, head_dim]
    return weight.unflatten(0, (-1, HEAD_DIM))[:, order].flatten(0, 1)


def canonical(model: Any, stem: str, config: ModelConfig) -> dict[str, Tensor]:
    """The published model's weights under our names."""
    theirs = dict(model.state_dict())
    tensors = {"embedding.weight": theirs["model.embed_tokens.weight"]}
    tensors["final_norm.weight"] = theirs["model.norm.weight"]
    if not config.tie_embeddings:
        tensors["head.weight"] = theirs["lm_head.weight"]
    norms = {
        "parallel": {"norm": "input_layernorm"},
        "pre_norm": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
        "post_norm": {
            "attention_norm": "post_attention_layernorm",
            "mlp_norm": "post_feedforward_layernorm",
        },
    }[config.block]
    names = {
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "attention.query_norm": "self_attn.q_norm",
        "attention.key_norm": "self_attn.k_norm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
        **norms,
    }
    for index in range(4):
        for our_name, their_name in names.items():
            weight = theirs.get(f"model.layers.{index}.{their_name}.weight")
            if weight is None:
                continue
            interleaved = stem.startswith("Cohere") and ("query" in our_name or "key" in our_name)
            tensors[f"blocks.{index}.{our_name}.weight"] = (
                half_split(weight) if interleaved else weight
            )
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}


def tolerance(logits: Tensor) -> float:
    return 1e-5 * max(1.0, logits.abs().max().item())


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_published_class(case: str) -> None:
    stem, fields, schemes, more = CASES[case]
    model = published(stem, fields)
    config = ours(stem, fields, schemes, more)
    tensors = canonical(model, stem, config)
    tokens = random_batch(VOCAB, 2, SEQ, seed=3).tokens
    with torch.no_grad():
        theirs = model(input_ids=tokens, use_cache=False).logits
        mine = PlainModel(config, tensors).logits(tokens)
    assert theirs.std() > 0.05  # the comparison can see something
    assert (mine - theirs).abs().max() <= tolerance(theirs)


@pytest.mark.parametrize("case", ["cohere2", "smollm3-rnope_swa"])
def test_documents_are_those_of_the_published_class(case: str) -> None:
    stem, fields, schemes, more = CASES[case]
    model = published(stem, fields)
    config = ours(stem, fields, schemes, more)
    batch = random_batch(VOCAB, 1, SEQ, seed=5)
    positions = torch.arange(SEQ)[None] - batch.starts
    assert (positions == 0).sum() > 2
    with torch.no_grad():
        # restarting position_ids mask documents only without a mask and without a cache
        theirs = model(
            input_ids=batch.tokens, position_ids=positions, attention_mask=None, use_cache=False
        ).logits
        mine = PlainModel(config, canonical(model, stem, config)).logits(batch.tokens, batch.starts)
    assert (mine - theirs).abs().max() <= tolerance(theirs)


@pytest.mark.parametrize("case", ["cohere2", "exaone4-rnope_swa"])
def test_loss_and_gradients_are_those_of_the_published_class(case: str) -> None:
    stem, fields, schemes, more = CASES[case]
    model = published(stem, fields)
    config = ours(stem, fields, schemes, more)
    tensors = canonical(model, stem, config)
    batch = random_batch(VOCAB, 2, SEQ, seed=9, documents=False)
    logits = model(input_ids=batch.tokens, use_cache=False).logits
    theirs = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100, reduction="sum"
    )
    theirs.backward()
    mine, per_token = PlainModel(config, tensors).loss(batch.tokens, batch.targets)
    mine.backward()
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert per_token.sum().item() == pytest.approx(mine.item(), rel=1e-5)
    assert (per_token[batch.targets == -100] == 0).all()
    # the published class holds its gradients under its own names and row order: borrow the map
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    expected = canonical(model, stem, config)
    assert expected.keys() == canonical_shapes(config).keys()
    for name, gradient in expected.items():
        assert relative_error(tensors[name].grad, gradient) <= 1e-5, name


@pytest.mark.parametrize("wrong", [WINDOW - 1, WINDOW + 1], ids=["one_key_less", "one_key_more"])
def test_a_window_off_by_one_is_seen(wrong: int) -> None:
    stem, fields, schemes, more = CASES["cohere2"]
    model = published(stem, fields)
    schemes = [scheme | {"window": wrong} if "window" in scheme else scheme for scheme in schemes]
    config = ours(stem, fields, schemes, more)
    tokens = random_batch(VOCAB, 2, SEQ, seed=3).tokens
    with torch.no_grad():
        theirs = model(input_ids=tokens, use_cache=False).logits
        mine = PlainModel(config, canonical(model, stem, config)).logits(tokens)
    assert (mine - theirs).abs().max() > 100 * tolerance(theirs)


def test_llama4_factor_has_the_published_values() -> None:
    schemes = [NOPE | {"score_scale": {"kind": "llama4", "floor": 8192, "coefficient": 0.1}}] * 4
    scheme = ours("Llama", {"rms_norm_eps": 1e-6}, schemes, {}).layer_plan.expand()[0]
    positions = torch.tensor([[8190, 8191, 65535, 131071, 262143]])
    factors = query_factor(scheme, positions, positions + 1, 1, torch.float64)
    expected = [1.0, 1.069315, 1.219722, 1.283321, 1.349651]  # transformers' Llama4 on these
    assert factors[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_position_dependent_scales_follow_their_papers() -> None:
    keys = torch.tensor([[1, 5, 100]])
    plan = [NOPE | {"score_scale": {"kind": "log", "base": 3.0}}] * 4
    scheme = ours("Llama", {"rms_norm_eps": 1e-6}, plan, {}).layer_plan.expand()[0]
    factors = query_factor(scheme, keys, keys, 4, torch.float64)[0].tolist()
    assert factors == pytest.approx([0.5 * math.log(3 + n, 3) for n in (1, 5, 100)])
    plan = [NOPE | {"score_scale": {"kind": "ssmax"}}] * 4
    scheme = ours("Llama", {"rms_norm_eps": 1e-6}, plan, {}).layer_plan.expand()[0]
    factors = query_factor(scheme, keys, keys, 4, torch.float64)[0].tolist()
    assert factors == pytest.approx([0.5 * math.log(n) for n in (1, 5, 100)])
