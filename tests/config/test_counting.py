"""Counts held to published parameter counts and to tables worked out by hand."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megahybrid.config import load
from megahybrid.config.counting import (
    attended_pairs,
    attended_pairs_of,
    flops_per_token,
    full_attention,
    ideal_speedup,
    kv_cache_bytes,
    layer_flops_per_token,
    layer_parameters,
    mean_keys,
    parameter_shapes,
    parameters,
    training_flops,
)
from megahybrid.config.memory_estimate import (
    activation_bytes_per_token,
    local_parameters,
    memory_per_rank,
    states_per_parameter,
)
from megahybrid.config.model import ModelConfig
from megahybrid.config.parsing import parse
from megahybrid.config.yaml_file import read_tree
from tests.config.example import example
from tests.config.test_config_files import CONFIGS


def shipped(name: str) -> ModelConfig:
    """A model of configs/models."""
    return parse(ModelConfig, read_tree(CONFIGS / f"models/{name}.yaml")["model"])


PUBLISHED = {
    "command_r7b": 8_028_033_024,
    "command_a": 111_057_580_032,
    "tiny_aya": 3_349_227_520,
    "llama31_8b": 8_030_261_248,
    "gemma3_1b": 999_885_952,
}
OWN = {
    "rnope_swa_tiny": 2_099_328,
    "rope_tiny": 2_099_328,
    "rnope_swa_150m": 154_150_656,
    "rnope_swa_1b": 1_241_548_800,
    "qk_norm_1b": 1_241_548_800 + 16 * (16 + 4) * 128,
    # Two norms a layer where a parallel block has one, and a sink for each head.
    "rnope_swa_sinks_1b": 1_241_548_800 + 16 * 2048 + 16 * 16,
    "rnope_swa_8b": 8_028_033_024,
    "olmo3_7b": 7_298_011_136,
}


@pytest.mark.parametrize(("name", "count"), (PUBLISHED | OWN).items())
def test_parameters_are_counted_exactly(name: str, count: int) -> None:
    model = shipped(name)
    assert parameters(model) == count
    layers = sum(layer_parameters(model, scheme) for scheme in model.layer_plan.expand())
    tables = (1 if model.tie_embeddings else 2) * model.vocab_size * model.hidden_size
    assert layers + tables + model.hidden_size == count


@pytest.mark.parametrize(
    ("qk_norm", "extra"),
    [
        ({"kind": "rms"}, 16 + 16),
        ({"kind": "rms", "weight": "per_head"}, 8 * 16 + 2 * 16),
        ({"kind": "layernorm", "over": "projection"}, 8 * 16 + 2 * 16),
    ],
)
def test_the_weights_of_qk_norm_count(qk_norm: dict[str, str], extra: int) -> None:
    plain = example().model
    changed = example(f"model.layer_plan.schemes.local.qk_norm={qk_norm}").model
    assert parameters(changed) - parameters(plain) == 6 * extra


def test_a_learned_logit_scale_counts_once_per_head() -> None:
    changed = example("model.layer_plan.schemes.global.score_scale={kind: ssmax}").model
    assert parameters(changed) - parameters(example().model) == 2 * 8
    assert parameter_shapes(changed)["blocks.3.attention.logit_scale"] == (8,)


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ((), {"blocks.0.attention_norm.weight", "blocks.0.mlp_norm.weight"}),
        (("model.block=parallel",), {"blocks.0.norm.weight"}),
        (
            ("model.block=post_norm",),
            {"blocks.0.attention_norm.weight", "blocks.0.mlp_norm.weight"},
        ),
    ],
)
def test_each_block_has_its_own_norms(overrides: tuple[str, ...], names: set[str]) -> None:
    shapes = parameter_shapes(example(*overrides).model)
    assert {n for n in shapes if n.startswith("blocks.0.") and "norm" in n} == names


# length: KV cache and attended pairs against full, FLOPs full over hybrid of 8B and 1B
GEOMETRY = {
    8192: (0.625, 0.8125, 1.023, 1.034),
    32768: (0.344, 0.426, 1.250, 1.363),
    65536: (0.297, 0.341, 1.517, 1.717),
    131072: (0.273, 0.296, 1.922, 2.203),
    262144: (0.262, 0.273, 2.434, 2.740),
}
# length: training GFLOP per token, 1B full and hybrid, 8B full and hybrid
GFLOP = {
    8192: (9.06, 8.76, 54.61, 53.40),
    32768: (13.89, 10.19, 73.94, 59.14),
    65536: (20.33, 11.84, 99.71, 65.73),
    131072: (33.22, 15.08, 151.25, 78.69),
}


@pytest.mark.parametrize("length", GEOMETRY)
def test_the_geometry_of_three_windowed_layers_to_one(length: int) -> None:
    large, small = shipped("rnope_swa_8b"), shipped("rnope_swa_1b")
    plan = large.layer_plan
    cache = kv_cache_bytes(large, length) / kv_cache_bytes(large, length, full_attention(plan))
    pairs = sum(attended_pairs(length, s.window) for s in plan.expand()) / (
        plan.num_layers * attended_pairs(length, None)
    )
    assert cache == pytest.approx(0.25 + 0.75 * min(length, 4096) / length)
    assert (round(cache, 3), round(pairs, len(str(GEOMETRY[length][1])) - 2)) == GEOMETRY[length][
        :2
    ]
    ratios = (round(ideal_speedup(large, length), 3), round(ideal_speedup(small, length), 3))
    assert ratios == GEOMETRY[length][2:]


@pytest.mark.parametrize("length", GFLOP)
def test_training_flops_per_token(length: int) -> None:
    found = tuple(
        round(flops_per_token(model, length, plan) / 1e9, 2)
        for model in (shipped("rnope_swa_1b"), shipped("rnope_swa_8b"))
        for plan in (full_attention(model.layer_plan), model.layer_plan)
    )
    assert found == GFLOP[length]


def test_the_layers_and_the_head_make_the_whole() -> None:
    model = shipped("rnope_swa_1b")
    layers = sum(layer_flops_per_token(model, s, 8192) for s in model.layer_plan.expand())
    head = 6 * model.vocab_size * model.hidden_size
    assert layers + head == pytest.approx(flops_per_token(model, 8192), rel=1e-12)


def test_the_key_value_cache_of_the_8b_in_gib() -> None:
    model = shipped("rnope_swa_8b")
    full = full_attention(model.layer_plan)
    for length, whole, hybrid in ((8192, 1.0, 0.625), (32768, 4.0, 1.375), (131072, 16.0, 4.375)):
        assert kv_cache_bytes(model, length, full) / 2**30 == whole
        assert kv_cache_bytes(model, length) / 2**30 == hybrid


@given(st.integers(1, 60), st.none() | st.integers(1, 70))
def test_attended_pairs_are_those_of_the_mask(length: int, window: int | None) -> None:
    visible = [
        (i, j)
        for i, j in itertools.product(range(length), repeat=2)
        if j <= i and (window is None or j > i - window)
    ]
    assert attended_pairs(length, window) == len(visible)
    assert mean_keys(length, window) == len(visible) / length


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.none() | st.integers(1, 70))
def test_documents_attend_within_themselves(lengths: list[int], window: int | None) -> None:
    assert attended_pairs_of(lengths, window) == sum(attended_pairs(n, window) for n in lengths)
    model = example().model
    assert training_flops(model, lengths) <= training_flops(model, [sum(lengths)])


# GB of states of 8.03 B parameters in bf16: data ranks, tensor ranks, ZeRO 2, ZeRO 3
STATES = [(8, 1, 30.1, 16.1), (4, 2, 22.1, 16.1), (2, 4, 18.1, 16.1), (16, 4, 5.8, 2.0)]


@pytest.mark.parametrize(("data", "tensor", "two", "three"), STATES)
def test_states_per_rank(data: int, tensor: int, two: float, three: float) -> None:
    def gigabytes(zero_stage: int) -> float:
        return sum(states_per_parameter("bf16", zero_stage, data)) * 8.03 / tensor

    assert gigabytes(2) == pytest.approx(two, abs=0.05)
    assert gigabytes(3) == pytest.approx(three, abs=0.05)
    assert gigabytes(1) == pytest.approx((6 + 12 / data) * 8.03 / tensor)
    assert gigabytes(0) == pytest.approx(18 * 8.03 / tensor)


@pytest.mark.parametrize(
    ("name", "length", "gigabytes"),
    [
        ("rnope_swa_8b", 8192, (36.5, 24.7, 2.1)),
        ("rnope_swa_8b", 131072, (584, 395, 34)),
        ("rnope_swa_1b", 32768, (39.7, 26.8, 2.1)),
        ("rnope_swa_1b", 131072, (159, 107, 8.6)),
    ],
)
def test_activations_of_one_sequence(name: str, length: int, gigabytes: tuple[float, ...]) -> None:
    model = shipped(name)
    for policy, expected in zip(("none", "selective", "full"), gigabytes, strict=True):
        kept = activation_bytes_per_token(model, policy) * model.layer_plan.num_layers * length
        # Selective keeps the heads as the product wrote them beside the rotated ones.
        assert kept / 1e9 == pytest.approx(expected, rel=0.03 if policy != "selective" else 0.11)


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_tensor_ranks_together_hold_every_parameter(tensor: int) -> None:
    model = shipped("rnope_swa_1b")
    local, whole = local_parameters(model, tensor), parameters(model)
    assert local >= whole // tensor
    replicated = 16 * 2048 + 2048  # norms
    if tensor > model.num_kv_heads:
        replicated += 16 * 2 * model.num_kv_heads * model.head_dim * model.hidden_size
    assert local == (whole - replicated) // tensor + replicated


def test_the_vocabulary_is_padded_for_the_tensor_ranks() -> None:
    model = example("model.vocab_size=4097").model
    extra = local_parameters(model, 2) - local_parameters(example().model, 2)
    assert extra == 8 * 128


def test_memory_falls_with_every_zero_stage_and_with_recomputation() -> None:
    run = load(CONFIGS / "runs/paper_rnope_swa_8b.yaml")
    by_stage: list[Any] = [
        memory_per_rank(
            run.model, run.stages[1], tensor=4, data_degree=8, zero_stage=z, precision="bf16"
        )
        for z in range(4)
    ]
    totals = [memory.total for memory in by_stage]
    assert totals == sorted(totals, reverse=True)
    assert len({memory.activations for memory in by_stage}) == 1


def test_a_policy_per_layer_lies_between_the_policies() -> None:
    def activations(recompute: str) -> int:
        run = example(f"stages.0.recompute={recompute}")
        return memory_per_rank(
            run.model, run.stages[0], tensor=1, data_degree=1, zero_stage=1, precision="fp32"
        ).activations

    mixed = activations("[full, full, full, full, none, none, none, none]")
    assert activations("full") < mixed < activations("none")
    assert activations("selective") < activations("none")
