"""The memory formulas against what a forward and backward really allocate, to the byte."""

import pytest
import torch

from benchmarks.shapes import hybrid, random_batch
from benchmarks.steps import our_loss, our_model
from megahybrid.config.memory import activations, working
from megahybrid.config.model import ModelConfig
from tests.memory import peak_bytes

CPU = torch.device("cpu")
LAYERS, TOKENS = 3, 1536
SHAPES = {
    "parallel": {},
    "parallel-wide-heads": {"num_heads": 4, "num_kv_heads": 2},
    "pre_norm-rms": {"block": "pre_norm", "norm": "rms"},
    "post_norm-rms": {"block": "post_norm", "norm": "rms"},
}


def shape(name: str) -> ModelConfig:
    config = hybrid("growth").model_copy(update={"vocab_size": 2048} | SHAPES[name])
    plan = config.layer_plan.model_copy(update={"num_layers": LAYERS, "pattern": ["local"]})
    return config.model_copy(update={"layer_plan": plan})


@pytest.mark.parametrize("name", SHAPES)
def test_the_formulas_are_within_a_tenth_of_the_peak(name: str) -> None:
    config = shape(name)
    inputs, targets = random_batch(config, 1, TOKENS, CPU)
    for policies in (["none"] * 3, ["selective"] * 3, ["full"] * 3, ["full", "selective", "none"]):
        model = our_model(config, CPU, torch.float32, policies)
        # A short one first: gradients exist from then on.
        our_loss(model, inputs[:, :64], targets[:, :64]).backward()
        measured = peak_bytes(lambda model=model: our_loss(model, inputs, targets).backward())
        batch = (policies, TOKENS, 1, "fp32", "cpu")
        foretold = activations(config, *batch) + working(config, *batch)
        assert foretold == pytest.approx(measured, rel=0.1), policies
