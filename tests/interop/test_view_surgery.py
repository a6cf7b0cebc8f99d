"""Layers that get a second view of their keys, and lose it where heads use one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megahybrid.checkpoint.names import published_path
from megahybrid.cli import main
from megahybrid.commands.trained_model import load_trained_model
from megahybrid.config.base import dump_yaml
from megahybrid.config.model import ModelConfig
from megahybrid.errors import ConfigError
from megahybrid.interop.surgery import read_plan
from megahybrid.interop.view_surgery import collapse, fuse
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh
from tests.interop.examples import checkpoint_of_model, model_of, run_of_model
from tests.plain_model import random_tensors

NOPE: dict[str, Any] = {"position": {"kind": "nope"}}
LOCAL: dict[str, Any] = {"position": {"kind": "rope", "theta": 10000.0}, "window": 5}
FUSED = NOPE | {"near": LOCAL, "fuse": {"gate": "token"}}
BY_HEAD = NOPE | {"near": LOCAL, "fuse": {"gate": "head"}}
TOKENS = torch.randint(61, (2, 31), generator=torch.Generator().manual_seed(3))


def plan_file(folder: Path, *schemes: dict[str, Any]) -> Path:
    path = folder / "plan.yaml"
    path.write_text(dump_yaml(run_of_model(model_of(schemes))))
    return path


def loaded(folder: Path) -> Transformer:
    return load_trained_model(folder, ParallelMesh.single()).model


def logits(folder: Path) -> Tensor:
    return loaded(folder).logits(TOKENS)


def checkpoint(folder: Path, model: ModelConfig, biases: dict[int, list[float]]) -> Path:
    """Random weights with these biases of shares by layer, and no weights of shares."""
    tensors = random_tensors(model, 3, dtype=torch.float32)
    for layer, values in biases.items():
        with torch.no_grad():
            tensors[f"blocks.{layer}.attention.fuse_gate.bias"].copy_(torch.tensor(values))
            if (name := f"blocks.{layer}.attention.fuse_gate.weight") in tensors:
                tensors[name].zero_()
    return published_path(checkpoint_of_model(folder, model, tensors=tensors), 7)


def test_a_trained_rnope_swa_becomes_fused_to_the_bit_and_comes_back(tmp_path: Path) -> None:
    """The window layer is the near view of what it becomes, the full one the far view."""
    before = checkpoint_of_model(tmp_path / "before", model_of([LOCAL, NOPE]))
    plan = plan_file(tmp_path, BY_HEAD, FUSED)
    out = tmp_path / "fused"
    arguments = ["checkpoint", "fuse", str(before), "--plan", str(plan), "--out", str(out)]
    assert main(arguments) == 0
    assert [s.fuse is not None for s in loaded(out).plan.expand()] == [True, True]
    assert torch.equal(logits(out), logits(before))

    shares = [{"heads": [{}] * 4}, {"heads": [{"near_share": 1e-9}] * 4}]
    analysis = tmp_path / "analysis.json"
    analysis.write_text(json.dumps({"results": [{"attention": {"layers": shares}}] * 2}))
    back = tmp_path / "back"
    arguments = ["checkpoint", "collapse", str(out), "--out", str(back)]
    assert main([*arguments, "--analysis", str(analysis)]) == 0
    assert loaded(back).plan.expand() == loaded(before).plan.expand()
    assert torch.equal(logits(back), logits(before))
    assert (back / "layer_plan.yaml").read_text().count("kind: rope") == 1


def test_heads_beyond_99_and_1_per_cent_collapse_and_others_stay(tmp_path: Path) -> None:
    """Layer 0 is split by its key heads, layer 1 has one head that uses both."""
    model = model_of([BY_HEAD, BY_HEAD])
    source = checkpoint(tmp_path / "one", model, {0: [5.0, 6.0, -7.0, -5.0], 1: [9.0, -9, 0, 9]})
    _, words = collapse(source, tmp_path / "two")
    assert words == (
        "layer 0: split in every head -> nope, all keys; near rope theta 10000, window 5; in 1 of "
        "2 key heads",
        "layer 1: 2 heads near, 1 far, 1 fused",
    )
    found = loaded(tmp_path / "two")
    split, kept = found.plan.expand()
    assert (split.split is not None, kept.fuse is not None) == (True, True)
    (bias,) = (p for name, p in found.named_parameters() if name.endswith("fuse_gate.bias"))
    assert bias.tolist() == [40.0, -40.0, 0.0, 40.0]
    shut = checkpoint(tmp_path / "shut", model, {0: [40.0, 40, -40, -40], 1: [40.0, -40, 0, 40]})
    assert torch.equal(logits(tmp_path / "two"), logits(shut))
    assert not torch.equal(logits(tmp_path / "two"), logits(source))
    plan = read_plan(tmp_path / "two/layer_plan.yaml", model)
    assert plan == found.plan


def test_what_surgery_of_views_cannot_do_is_said_in_one_line(tmp_path: Path) -> None:
    folder = checkpoint_of_model(tmp_path / "before", model_of([LOCAL, LOCAL]))
    before = published_path(folder, 7)
    wider = LOCAL | {"window": 9}
    with pytest.raises(ConfigError, match=r"^layer 1 of the plan \(.*\) has no view that is the "):
        fuse(before, plan_file(tmp_path, LOCAL, FUSED | {"near": wider}), tmp_path / "out")
    with pytest.raises(ConfigError, match="has the source's layers: nothing is fused"):
        fuse(before, plan_file(tmp_path, LOCAL, LOCAL), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"has no fused layer \(0 schemes with fuse\)"):
        collapse(before, tmp_path / "out")
    token = published_path(checkpoint_of_model(tmp_path / "token", model_of([FUSED])), 7)
    with pytest.raises(ConfigError, match=r"fuse\.gate=token\)\. Give --analysis, a result of"):
        collapse(token, tmp_path / "out")
    assert not (tmp_path / "out").exists()
