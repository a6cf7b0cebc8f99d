"""Small models of any plan, as checkpoints on disk, and checks against the independent oracle."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megahybrid.checkpoint.fingerprint import model_fingerprint
from megahybrid.checkpoint.fragments import Fragment, whole
from megahybrid.checkpoint.writer import Snapshot, save
from megahybrid.config import RunConfig, parse
from megahybrid.config.base import dump
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig
from tests.config.example import example
from tests.plain_model import random_tensors

# Every test here compares with it, so every module that imports this one is skipped without it.
pytest.importorskip(
    "transformers", reason="transformers is not installed: nothing to export to or import from"
)

Scheme = dict[str, Any]
ROPE: Scheme = {"position": {"kind": "rope", "theta": 10000.0}}
NOPE: Scheme = {"position": {"kind": "nope"}}
LOCAL: Scheme = ROPE | {"window": 5}
HEAD: Scheme = {"qk_norm": {"kind": "rms", "over": "head", "weight": "shared"}}
WHOLE: Scheme = {"qk_norm": {"kind": "rms", "over": "projection"}}
PER_HEAD: Scheme = {"qk_norm": {"kind": "layernorm", "over": "head", "weight": "per_head"}}
PARALLEL = {"block": "parallel", "norm": "layernorm"}


def plan_of(schemes: Sequence[Scheme]) -> LayerPlan:
    """A plan with a scheme of its own for every layer."""
    names = [f"layer{index}" for index in range(len(schemes))]
    return parse(
        LayerPlan,
        {
            "num_layers": len(schemes),
            "pattern": names,
            "schemes": dict(zip(names, schemes, strict=True)),
        },
    )


def model_of(schemes: Sequence[Scheme], **fields: Any) -> ModelConfig:
    """A tiny model with these layers."""
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
    }
    return ModelConfig(**(sizes | fields), layer_plan=plan_of(schemes))


def run_of_model(model: ModelConfig, *overrides: str) -> RunConfig:
    """A run that could train the model."""
    run = example("parallel.tensor=1", *overrides)
    return parse(RunConfig, dump(run) | {"model": dump(model)})


def checkpoint_of_model(
    directory: Path,
    model: ModelConfig,
    *,
    seed: int = 3,
    std: float = 0.15,
    tensors: Mapping[str, torch.Tensor] | None = None,
    run: RunConfig | None = None,
) -> Path:
    """A run's folder with one checkpoint whose weights all matter."""
    if tensors is None:
        tensors = random_tensors(model, seed, dtype=torch.float32, std=std)
    fragments = [
        Fragment(
            name, "weight", whole(tensor.shape), (0, tensor.numel()), tensor.detach().flatten()
        )
        for name, tensor in tensors.items()
    ]
    result = save(
        directory,
        Snapshot(
            step=7,
            tokens=57_344,
            optimizer_step=7,
            model_fingerprint=model_fingerprint(model),
            tensors={name: tuple(tensor.shape) for name, tensor in tensors.items()},
            fragments=fragments,
            train_state={},
            config=(run or run_of_model(model)).model_dump(mode="json"),
            states=("weight",),
        ),
        keep_last=3,
    )
    assert result.path is not None, result.error
    return directory


def output_of_card(folder: Path) -> Any:
    """What the program in an export's card prints, run as it stands but for the folder's name."""
    program = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    printed: list[Any] = []
    exec(program.replace("FOLDER", str(folder)), {"print": printed.append})
    (output,) = printed
    return output
