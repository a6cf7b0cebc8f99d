"""The memory formulas against what a forward and backward really allocate, to the byte."""

import pytest
import torch

from benchmarks.shapes import hybrid, random_batch
from benchmarks.steps import our_loss, our_model
from megahybrid.config import chunk_sizes
from megahybrid.config.memory_estimate import activations, working
from megahybrid.config.model import ModelConfig
from megahybrid.model.kernels import tiles
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


def of_formulas(config: ModelConfig, policies: list[str], tokens: int) -> tuple[int, int]:
    """What a forward and backward under `policies` allocate at most: by measure and by formula."""
    inputs, targets = random_batch(config, 1, tokens, CPU)
    model = our_model(config, CPU, torch.float32, policies)
    # A short one first: gradients exist from then on.
    our_loss(model, inputs[:, :64], targets[:, :64]).backward()
    measured = peak_bytes(lambda: our_loss(model, inputs, targets).backward())
    batch = (policies, tokens, 1, "fp32", "cpu")
    return measured, activations(config, *batch) + working(config, *batch)


@pytest.fixture
def by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows by SDPA's blocks, whose copies the formulas count; tiles keep none."""
    monkeypatch.setattr(tiles, "serves", lambda *heads: False)


@pytest.mark.parametrize("name", SHAPES)
def test_tiles_need_less_than_the_formulas_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served = []
    serves = tiles.serves
    monkeypatch.setattr(tiles, "serves", lambda *heads: served.append(serves(*heads)) or served[-1])
    for policies in (["none"] * 3, ["selective"] * 3, ["full"] * 3, ["chunked"] * 3):
        measured, foretold = of_formulas(shape(name), policies, TOKENS)
        assert 0.5 * foretold < measured < 1.05 * foretold, policies
    assert any(served)


@pytest.mark.parametrize("name", SHAPES)
def test_the_formulas_are_within_a_tenth_of_the_peak(name: str, by_blocks: None) -> None:
    config = shape(name)
    for policies in (["none"] * 3, ["selective"] * 3, ["full"] * 3, ["full", "selective", "none"]):
        measured, foretold = of_formulas(config, policies, TOKENS)
        assert foretold == pytest.approx(measured, rel=0.1), policies


@pytest.mark.parametrize("name", SHAPES)
def test_the_formulas_are_within_a_tenth_of_the_peak_with_the_mlp_in_chunks(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_sizes, "CHUNK_TOKENS", 192)
    monkeypatch.setattr(tiles, "serves", lambda *heads: False)
    # A small vocabulary, so that the fullest moment is a layer's and not the loss's.
    config = shape(name).model_copy(update={"vocab_size": 256})
    peaks = {}
    for policies in (["chunked"] * 3, ["full"] * 3, ["full", "chunked", "selective"]):
        measured, foretold = of_formulas(config, policies, 2048)
        peaks[tuple(policies)] = measured
        assert foretold == pytest.approx(measured, rel=0.1), policies
    monkeypatch.undo()
    monkeypatch.setattr(tiles, "serves", lambda *heads: False)
    whole, _ = of_formulas(config, ["full"] * 3, 2048)
    assert peaks["full", "full", "full"] < 0.8 * whole
