"""The table of parameters by name: first values, weight decay, learning-rate multiplier, kind.

One table, two parametrisations. `standard`: normal with `initial_std` (the embedding:
`embedding_std`), projections back to the residual stream divided by sqrt(2 * layers). `mup` (arXiv
2203.03466, table 8, Adam): hidden matrices have their variance and learning rate divided by the
width ratio m = hidden / base_hidden, an untied head is drawn with std / m and learns at rate / m;
decay is multiplied by m where the rate is divided by it, so that rate * decay does not depend on
the width. With tied embeddings muP wants the logits divided by m: that is a factor of the function
itself and is written as model.logit_scale; `check` warns where another one stands there.
"""

import math
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import nn

from megahybrid.config.fusion import first_bias
from megahybrid.config.model import ModelConfig
from megahybrid.config.score_scale import (
    FixedScale,
    Llama4Scale,
    LogFromScale,
    LogScale,
    PowerScale,
    ScoreScale,
    SqrtDimScale,
    SsmaxScale,
)
from megahybrid.config.ssmax_start import start_of
from megahybrid.config.training import OptimizerConfig
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.random import fill_normal
from megahybrid.parallel.sharding import ShardSpec

KINDS = ("embedding", "attention", "mlp", "norm", "head")


@dataclass(frozen=True)
class ParameterRule:
    """One row of the table. `std` None: filled with `constant`."""

    kind: str
    std: float | None
    constant: float
    weight_decay: float  # multiplies optimizer.weight_decay; 0 for vectors
    learning_rate: float  # multiplies the step's learning rate


def parameter_rule(name: str, model: ModelConfig, optimizer: OptimizerConfig) -> ParameterRule:
    """The row for canonical parameter `name`."""
    width_ratio = optimizer.width_ratio(model.hidden_size)
    if "norm" in name.rsplit(".", 2)[-2]:
        return ParameterRule("norm", None, 1.0, 0.0, 1.0)
    if name.endswith(".logit_scale"):
        scheme = model.layer_plan.expand()[int(name.split(".")[1])]
        return ParameterRule("attention", None, _initial(scheme.score_scale), 0.0, 1.0)
    if name.endswith(".fuse_gate.bias"):
        fuse = model.layer_plan.expand()[int(name.split(".")[1])].fuse
        assert fuse is not None
        return ParameterRule("attention", None, first_bias(fuse), 0.0, 1.0)
    if name.endswith(".fuse_gate.weight"):  # a share that is the same at every token, at first
        return ParameterRule("attention", 0.0, 0.0, width_ratio, 1 / width_ratio)
    if name.endswith((".bias", ".sinks")):
        return ParameterRule("attention", None, 0.0, 0.0, 1.0)
    if name.startswith("embedding."):
        return ParameterRule("embedding", model.embedding_std or model.initial_std, 0.0, 1.0, 1.0)
    if name.startswith("head."):
        std = model.initial_std / width_ratio
        return ParameterRule("head", std, 0.0, width_ratio, 1 / width_ratio)
    kind = next((kind for kind in ("attention", "mlp") if f".{kind}." in name), None)
    assert kind is not None, f"{name} has no row in this table"
    std = model.initial_std / math.sqrt(width_ratio)
    if name.endswith((".output.weight", ".down.weight")):
        std /= math.sqrt(2 * model.layer_plan.num_layers)
    return ParameterRule(kind, std, 0.0, width_ratio, 1 / width_ratio)


def _initial(scale: ScoreScale) -> float:
    """The first value of a scale's learned factors."""
    match scale:
        case SsmaxScale():
            return start_of(scale)
        case (
            SqrtDimScale()
            | FixedScale()
            | Llama4Scale()
            | PowerScale()
            | LogScale()
            | LogFromScale()
        ):
            raise AssertionError(f"a score scale of kind {scale.kind} learns nothing")
        case never:
            assert_never(never)


@torch.no_grad()
def initialise(model: Transformer, seed: int, optimizer: OptimizerConfig) -> None:
    """Fill every parameter: the same values at every tensor degree, drawn slice by slice."""
    for parameter, spec in model.sharded_parameters().values():
        draw(parameter, spec, model.config, seed, optimizer)


@torch.no_grad()
def draw(
    parameter: nn.Parameter,
    spec: ShardSpec,
    model: ModelConfig,
    seed: int,
    optimizer: OptimizerConfig,
) -> None:
    """Fill one parameter, this rank's share of what `spec` says, by its row of the table."""
    rules = {
        segment.name: parameter_rule(segment.name, model, optimizer) for segment in spec.segments
    }
    drawn = {name: rule.std for name, rule in rules.items() if rule.std is not None}
    if drawn:
        fill_normal(parameter, spec, seed, drawn)
    else:
        parameter.fill_(next(iter(rules.values())).constant)
