"""The table of first values, weight decay and learning rates, and the draws that follow it."""

import math

import pytest
import torch

from megahybrid.config.model import ModelConfig
from megahybrid.config.training import OptimizerConfig
from megahybrid.model.init import initialise, parameter_rule
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.parallel.sharding import ShardSpec
from tests import distributed

STANDARD = OptimizerConfig()
MUP = OptimizerConfig(parametrisation="mup", base_hidden_size=16)


def config(**changes: object) -> ModelConfig:
    fields = {
        "vocab_size": 999,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_heads": 4,
        "num_kv_heads": 2,
        "tie_embeddings": False,
        "layer_plan": {
            "num_layers": 2,
            "pattern": ["global"],
            "schemes": {
                "global": {
                    "position": {"kind": "nope"},
                    "qk_norm": {"kind": "rms"},
                    "score_scale": {"kind": "ssmax", "initial": 0.5},
                }
            },
        },
    }
    return ModelConfig.model_validate(fields | changes)


def canonical(model: Transformer) -> dict[str, torch.Tensor]:
    parts = [(spec, parameter.detach()) for parameter, spec in model.sharded_parameters().values()]
    return {name: whole for part in parts for name, whole in ShardSpec.join([part]).items()}


@pytest.mark.parametrize(
    ("name", "kind", "std", "decay", "rate"),
    [
        ("embedding.weight", "embedding", 0.02, 1, 1),
        ("head.weight", "head", 0.02, 1, 1),
        ("blocks.1.attention.query.weight", "attention", 0.02, 1, 1),
        ("blocks.1.attention.output.weight", "attention", 0.02 / math.sqrt(4), 1, 1),
        ("blocks.1.mlp.gate.weight", "mlp", 0.02, 1, 1),
        ("blocks.1.mlp.down.weight", "mlp", 0.02 / math.sqrt(4), 1, 1),
        ("blocks.1.attention_norm.weight", "norm", None, 0, 1),
        ("blocks.1.attention.query_norm.weight", "norm", None, 0, 1),
        ("final_norm.weight", "norm", None, 0, 1),
        ("blocks.1.attention.logit_scale", "attention", None, 0, 1),
        ("blocks.1.attention.key.bias", "attention", None, 0, 1),
        ("blocks.1.attention.sinks", "attention", None, 0, 1),
    ],
)
def test_the_standard_table_says_this(name, kind, std, decay, rate):
    rule = parameter_rule(name, config(), STANDARD)
    assert (rule.kind, rule.weight_decay, rule.learning_rate) == (kind, decay, rate)
    assert rule.std == (None if std is None else pytest.approx(std))


def test_the_embedding_may_be_drawn_wider_than_the_rest():
    wide = config(embedding_std=1.0)
    assert parameter_rule("embedding.weight", wide, STANDARD).std == 1.0
    assert parameter_rule("head.weight", wide, STANDARD).std == 0.02


@pytest.mark.parametrize(
    ("name", "std", "decay", "rate"),
    [
        ("embedding.weight", 0.02, 1, 1),
        ("head.weight", 0.02 / 4, 4, 1 / 4),
        ("blocks.0.attention.key.weight", 0.02 / 2, 4, 1 / 4),
        ("blocks.0.mlp.down.weight", 0.02 / 2 / math.sqrt(4), 4, 1 / 4),
        ("blocks.0.mlp_norm.weight", None, 0, 1),
    ],
)
def test_mup_divides_by_the_width_ratio_four(name, std, decay, rate):
    rule = parameter_rule(name, config(), MUP)
    assert (rule.weight_decay, rule.learning_rate) == (decay, rate)
    assert rule.std == (None if std is None else pytest.approx(std))


def test_drawn_values_have_the_tables_spread_and_constants_are_exact():
    model = Transformer(config(hidden_size=128), ParallelMesh.single())
    initialise(model, 7, STANDARD)
    for name, value in canonical(model).items():
        rule = parameter_rule(name, model.config, STANDARD)
        if rule.std is None:
            assert torch.all(value == rule.constant), name
        else:
            # The standard error of a standard deviation is std / sqrt(2 n); five of them.
            error = 5 * rule.std / math.sqrt(2 * value.numel())
            assert value.std().item() == pytest.approx(rule.std, abs=error), name
            assert abs(value.mean().item()) < 5 * rule.std / math.sqrt(value.numel()), name


def test_another_seed_draws_other_values_and_names_draw_apart():
    first, second = (Transformer(config(), ParallelMesh.single()) for _ in range(2))
    initialise(first, 1, STANDARD)
    initialise(second, 2, STANDARD)
    one, two = canonical(first), canonical(second)
    assert not torch.equal(one["head.weight"], two["head.weight"])
    assert not torch.equal(one["blocks.0.mlp.gate.weight"], one["blocks.0.mlp.up.weight"])
    assert not torch.equal(one["blocks.0.mlp.gate.weight"], one["blocks.1.mlp.gate.weight"])


def _shards(ranks: distributed.Ranks, tie: bool) -> list[tuple[ShardSpec, torch.Tensor]]:
    model = Transformer(config(tie_embeddings=tie), ranks.mesh(tensor=ranks.world_size))
    initialise(model, 3, STANDARD)
    return [(spec, parameter.detach()) for parameter, spec in model.sharded_parameters().values()]


@pytest.mark.parametrize("tensor", [2, 4])
def test_every_tensor_degree_starts_from_the_same_weights(tensor):
    alone = Transformer(config(), ParallelMesh.single())
    initialise(alone, 3, STANDARD)
    expected = canonical(alone)
    shards = distributed.run(tensor, _shards, False)
    seen = set()
    for parts in zip(*shards, strict=True):
        for name, whole in ShardSpec.join(list(parts)).items():
            assert torch.equal(whole, expected[name]), name
            seen.add(name)
    assert seen == set(expected)
