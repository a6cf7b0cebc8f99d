"""Rotation: its laws, and the bits of the published implementation."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megahybrid.config.attention import Rope
from megahybrid.config.scaling import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NtkScaling,
    YarnScaling,
)
from megahybrid.model.kernels.documents import Documents
from megahybrid.model.rotary import RotaryTable, rotate

CPU = torch.device("cpu")


def table(rope: Rope, head_dim: int, length: int, **options: Any) -> RotaryTable:
    """A table on the CPU, in float64 unless told otherwise."""
    chosen = {"documents": None, "device": CPU, "dtype": torch.float64, **options}
    return RotaryTable.build(rope, head_dim, length, **chosen)


def rope(theta: float = 10000.0, **fields: Any) -> Rope:
    """A Rope value."""
    return Rope(kind="rope", theta=theta, **fields)


SCALINGS: dict[str, tuple[dict[str, Any], Any]] = {
    "default": ({"rope_type": "default"}, None),
    "linear": ({"rope_type": "linear", "factor": 7.3}, LinearScaling(kind="linear", factor=7.3)),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        Llama3Scaling(kind="llama3", factor=8.0, original_length=8192),
    ),
    "llama3-step": (
        {
            "rope_type": "llama3",
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
        Llama3Scaling(kind="llama3", factor=16.0, high_frequency_factor=1.0, original_length=8192),
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096},
        YarnScaling(kind="yarn", factor=8.0, original_length=4096),
    ),
    "yarn-short": (
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64},
        YarnScaling(kind="yarn", factor=40.0, original_length=64),
    ),
    "yarn-smooth": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 8192,
            "truncate": False,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
            "attention_factor": 1.3,
        },
        YarnScaling(
            kind="yarn",
            factor=4.0,
            original_length=8192,
            truncate=False,
            beta_fast=24.0,
            beta_slow=2.0,
            attention_factor=1.3,
        ),
    ),
}
# A number for each of the pairs of a head of so many dimensions.
NUMBERS = {d: [1.0 + 0.37 * i * i / d for i in range(d // 2)] for d in (16, 64, 96, 128)}


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("theta", [100.0, 10000.0, 50000.0, 500000.0, 4000000.0])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_frequencies_are_those_of_transformers_to_the_bit(
    head_dim: int, theta: float, kind: str
) -> None:
    transformers = pytest.importorskip("transformers.modeling_rope_utils")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    fields, scaling = SCALINGS[kind]
    config = SimpleNamespace(
        rope_parameters={"rope_theta": theta, **fields},
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=131072,
        standardize_rope_params=lambda: None,
    )
    if kind == "default":
        theirs, factor = llama.LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        theirs, factor = transformers.ROPE_INIT_FUNCTIONS[fields["rope_type"]](config)
    ours = rope(theta, scaling=scaling)
    assert torch.equal(ours.frequencies(head_dim, torch, torch.float32), theirs)
    assert ours.attention_factor() == factor


@pytest.mark.parametrize("grown", [1.0, 32.0])
@pytest.mark.parametrize("head_dim", NUMBERS)
def test_longrope_is_that_of_transformers_to_the_bit(head_dim: int, grown: float) -> None:
    transformers = pytest.importorskip("transformers.modeling_rope_utils")
    numbers = NUMBERS[head_dim]
    fields = {"rope_theta": 1e4, "factor": grown, "original_max_position_embeddings": 4096}
    config = SimpleNamespace(
        rope_parameters=fields | {"short_factor": numbers, "long_factor": numbers[::-1]},
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        standardize_rope_params=lambda: None,
    )
    function = transformers.ROPE_INIT_FUNCTIONS["longrope"]
    for length, factors in ((4096, numbers), (4097, numbers[::-1])):
        theirs, factor = function(config, seq_len=length)
        scaling = LongRopeScaling(
            kind="longrope", factors=factors, factor=grown, original_length=4096
        )
        ours = rope(scaling=scaling)
        assert torch.equal(ours.frequencies(head_dim, torch, torch.float32), theirs)
        assert ours.attention_factor() == factor


@given(st.sampled_from([8, 64, 96, 128]), st.floats(2, 1e7), st.floats(0.02, 1))
def test_the_heads_spectrum_is_proportional_to_the_bit(
    head_dim: int, theta: float, fraction: float
) -> None:
    transformers = pytest.importorskip("transformers.modeling_rope_utils")
    config = SimpleNamespace(
        rope_parameters={"rope_theta": theta, "partial_rotary_factor": fraction},
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        standardize_rope_params=lambda: None,
    )
    theirs, _ = transformers.ROPE_INIT_FUNCTIONS["proportional"](config)
    ours = rope(theta, rotary_fraction=fraction, spectrum="head")
    found = ours.frequencies(head_dim, torch, torch.float32)
    assert torch.equal(theirs[: len(found)], found) and not theirs[len(found) :].any()
    part = rope(theta, rotary_fraction=0.5).frequencies(head_dim, torch, torch.float32)
    assert not torch.equal(part, theirs[: len(part)])


@pytest.mark.parametrize("kind", SCALINGS)
def test_turned_vectors_are_those_of_transformers(kind: str) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    fields, scaling = SCALINGS[kind]
    config = llama.LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=32768,
        rope_parameters={"rope_theta": 10000.0, **fields},
    )
    x = torch.randn(2048, 1, 4, 64)
    embedding = llama.LlamaRotaryEmbedding(config)
    cos, sin = embedding(x, torch.arange(2048)[None])
    across = x.permute(1, 2, 0, 3)
    theirs, _ = llama.apply_rotary_pos_emb(across, across, cos, sin)
    built = table(rope(scaling=scaling), 64, 2048, dtype=torch.float32)
    assert torch.equal(built.cos[:, 0, 0], cos[0]) and torch.equal(
        built.sin[:, 0, 0], sin[0, :, :32]
    )
    assert (rotate(x, built).permute(1, 2, 0, 3) - theirs).abs().max() < 1e-6


def test_static_ntk_is_plain_rope_with_a_larger_theta() -> None:
    ntk = rope(1e4, scaling=NtkScaling(kind="ntk", factor=4.0))
    plain = rope(1e4 * 4.0 ** (64 / 62))
    assert torch.equal(*(r.frequencies(64, torch, torch.float32) for r in (ntk, plain)))


@given(st.integers(0, 500), st.integers(0, 60), st.integers(0, 60), st.sampled_from([0.25, 0.5, 1]))
def test_scores_know_relative_position_alone(shift: int, i: int, j: int, fraction: float) -> None:
    built = table(rope(rotary_fraction=fraction), 32, 600)
    generator = torch.Generator().manual_seed(i)
    q, k = (torch.randn(32, generator=generator, dtype=torch.float64) for _ in range(2))
    turned_q, turned_k = (rotate(x.expand(600, 1, 1, 32), built)[:, 0, 0] for x in (q, k))
    near = turned_q[i] @ turned_k[j]
    far = turned_q[i + shift] @ turned_k[j + shift]
    # fp32 angles: 600 positions times half a unit in the last place, on each side
    assert (near - far).abs() < 600 * 2.0**-22 * q.norm() * k.norm()


def test_turning_keeps_lengths_and_position_zero_is_identity() -> None:
    x = torch.randn(100, 2, 3, 16, dtype=torch.float64)
    turned = rotate(x, table(rope(), 16, 100))
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6)
    assert torch.equal(turned[0], x[0])
    assert not torch.allclose(turned[1], x[1])


def test_zero_frequency_is_the_identity() -> None:
    built = table(rope(scaling=LinearScaling(kind="linear", factor=1e38)), 16, 50)
    x = torch.randn(50, 1, 2, 16, dtype=torch.float64)
    assert torch.equal(rotate(x, built), x)


def test_only_the_first_fraction_of_a_head_turns() -> None:
    x = torch.randn(40, 1, 2, 32, dtype=torch.float64)
    turned = rotate(x, table(rope(rotary_fraction=0.25), 32, 40))
    assert torch.equal(turned[..., 8:], x[..., 8:])
    assert torch.equal(turned[..., :8], rotate(x[..., :8], table(rope(), 8, 40)))


def test_positions_restart_at_documents() -> None:
    documents = Documents.from_lengths([[10, 30], [25, 15]])
    built = table(rope(), 16, 40, documents=documents)
    plain = table(rope(), 16, 40)
    for row, border in ((0, 10), (1, 25)):
        for got, want in ((built.cos, plain.cos), (built.sin, plain.sin)):
            assert torch.equal(got[:border, row], want[:border, 0])
            assert torch.equal(got[border:, row], want[: 40 - border, 0])


def test_the_gradient_of_a_rotation_is_the_rotation_back() -> None:
    built = table(rope(rotary_fraction=0.5), 8, 6)
    x = torch.randn(6, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, built), (x,))


def test_angles_are_fp32_whatever_the_model_computes_in() -> None:
    wide, narrow = (table(rope(), 16, 3000, dtype=d) for d in (torch.float64, torch.float32))
    assert torch.equal(wide.cos.float(), narrow.cos)
    assert torch.equal(wide.cos, narrow.cos.double())
