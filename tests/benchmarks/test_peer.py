"""The peer has our weights and computes our loss: else its speed would say nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cohere2, recompute
from benchmarks.shapes import full, hybrid, random_batch
from benchmarks.steps import lent_head, our_loss, our_model, peer_loss, peer_model, peer_step
from megahybrid.config.counting import parameters
from megahybrid.config.model import ModelConfig

pytest.importorskip("transformers", reason="transformers is not installed: there is no peer")

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def errors(config: ModelConfig, length: int = 80) -> tuple[float, float]:
    """(loss error, worst gradient error) of ours against Cohere2 with our weights."""
    tokens, targets = random_batch(config, 2, length, CPU)
    ours = our_model(config, CPU, torch.float32)
    peer = peer_model(ours, length, "sdpa")
    mine, theirs = our_loss(ours, tokens, targets), peer_loss(peer, tokens)
    mine.backward()
    theirs.backward()
    gradients = cohere2.gradient_errors(ours, peer)
    return abs(mine.item() / theirs.item() - 1), max(gradients.values())


@pytest.mark.parametrize("config", [hybrid("tiny"), full("tiny")], ids=["hybrid", "full"])
def test_cohere2_with_our_weights_gives_our_loss_and_gradients(config: ModelConfig) -> None:
    loss, gradients = errors(config)
    assert loss < 1e-6
    assert gradients < 1e-5


def test_rotated_rows_left_in_our_order_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cohere2, "interleaved", lambda weight, head_dim: weight)
    assert errors(hybrid("tiny"))[1] > 1e-2


def test_a_lent_loss_takes_the_same_step() -> None:
    config = hybrid("tiny")
    tokens, _ = random_batch(config, 2, 64, CPU)
    ours = our_model(config, CPU, torch.float32)
    alone, lent = (peer_model(ours, 64, "sdpa", loss_apart=apart) for apart in (False, True))
    steps = peer_step(alone, tokens), peer_step(lent, tokens, 1, lent_head(lent, ours))
    for _ in range(2):
        first, second = (step() for step in steps)
    assert first == pytest.approx(second, rel=1e-6)


def test_recompute_policies_fit_and_cost_the_least() -> None:
    config, tokens = hybrid("1b"), 131072
    assert parameters(config) == 1_241_548_800
    plenty = recompute.solve(config, 8192, 1e12, 8192)
    assert set(plenty) == {"none"}
    budget = 115 * 2**30
    policies = recompute.solve(config, tokens, budget, tokens)
    assert recompute.expected_bytes(config, policies, tokens) <= budget
    layers_in_full = [index for index, policy in enumerate(policies) if policy == "full"]
    windows = [scheme.window for scheme in config.layer_plan.expand()]
    assert layers_in_full and all(windows[index] for index in layers_in_full)
    policies[layers_in_full[-1]] = "selective"
    assert recompute.expected_bytes(config, policies, tokens) > budget


def train_step(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`python -m benchmarks.train_step` in `folder`."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.train_step", *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_comparison_runs_and_keeps_its_figures(tmp_path: Path) -> None:
    done = train_step(
        tmp_path, "--shape", "tiny", "--rounds", "1", "--lengths", "64", "--peers", "sdpa"
    )
    assert done.returncode == 0, done.stderr
    assert "| 64 | transformers sdpa |" in done.stdout
    kept = json.loads((tmp_path / "build/bench/train_step_cpu.json").read_text())
    assert kept["lengths"][0]["gate"]["sdpa"]["gradient_error"] < 1e-5
    assert len(kept["lengths"][0]["times"]["megahybrid"]["wall"]) == 1


def test_the_plan_for_one_gpu_runs_here_and_outlives_a_peer_that_fails(tmp_path: Path) -> None:
    done = train_step(tmp_path, "--rehearse", "--steps", "1", "--peers", "nonsense")
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "build/bench/train_step_rehearsal.json").read_text())
    kinds = {(row["kind"], row["length"]) for row in kept["rows"]}
    assert {("hybrid", 64), ("hybrid", 128), ("hybrid", 256), ("full", 128)} <= kinds
    assert {"hybrid through DeepSpeed", "hybrid, packed documents"} <= {kind for kind, _ in kinds}
    assert kept["kernels_chosen"] == {
        n: {"full": "sdpa", "windowed": "blocked"} for n in ("64", "128")
    }
    notes = " ".join(kept["notes"])
    assert "transformers nonsense at 64: " in notes and "128: " in notes
    assert done.stdout.splitlines()[-1].startswith("all times: ")
