"""The peer has our weights and computes our loss: else its speed would say nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import recompute
from benchmarks.peers import cohere2, peer_config, peer_of
from benchmarks.peers.peer import gradient_errors, lent_loss, peer_step
from benchmarks.shapes import full, hybrid, random_batch
from benchmarks.steps import our_loss, our_model, our_step
from megahybrid.config.counting import parameters
from megahybrid.config.model import ModelConfig
from megahybrid.parallel.mesh import initialise_distributed, shutdown_distributed

pytestmark = pytest.mark.filterwarnings("ignore:::megatron")
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
PEERS = {"sdpa": "transformers", "megatron": "megatron.core", "torchtitan": "torchtitan"}
PEERS["megatron+patched"] = PEERS["megatron"]


@pytest.fixture
def alone() -> Iterator[None]:
    """A world of one, which megatron-core wants."""
    initialise_distributed("cpu")
    yield
    if (state := sys.modules.get("megatron.core.parallel_state")) is not None:
        state.destroy_model_parallel()
    shutdown_distributed(ok=False)


def there(name: str) -> None:
    """Skips where the peer's library cannot be imported."""
    pytest.importorskip(PEERS[name], reason=f"{PEERS[name]} is not installed")
    if name == "torchtitan":
        pytest.importorskip("triton", reason="torchtitan needs triton, which this torch lacks")
        pytest.importorskip("torchtitan.models.attention", reason="not torchtitan 0.2")


def errors(name: str, config: ModelConfig, length: int = 80) -> tuple[float, float]:
    """(loss error, worst gradient error) of ours against a peer with our weights."""
    config = peer_config(name, config)
    tokens, targets = random_batch(config, 2, length, CPU)
    ours = our_model(config, CPU, torch.float32)
    peer = peer_of(name, ours, length)
    mine, theirs = our_loss(ours, tokens, targets), peer.loss(tokens)
    mine.backward()
    theirs.backward()
    gradients = gradient_errors(ours, peer)
    return abs(mine.item() / theirs.item() - 1), max(gradients.values())


@pytest.mark.parametrize("config", [hybrid("tiny"), full("tiny")], ids=["hybrid", "full"])
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_with_our_weights_gives_our_loss_and_gradients(
    name: str, config: ModelConfig, alone: None
) -> None:
    there(name)
    loss, gradients = errors(name, config)
    assert loss < 1e-6
    assert gradients < 1e-5


def test_ligers_pieces_stand_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels want CUDA; here plain ones with the same arguments stand for them."""
    there("sdpa")
    ops, modules = ModuleType("liger_kernel.ops"), ModuleType("liger_kernel.transformers")
    used = []

    class SiLUMul:
        @staticmethod
        def apply(gate: torch.Tensor, up: torch.Tensor, by: float, down: float) -> torch.Tensor:
            used.append((by, down))
            return torch.nn.functional.silu(gate) * up

    class Loss(torch.nn.Module):
        def forward(self, weight: torch.Tensor, hidden: torch.Tensor, target: torch.Tensor) -> Any:
            assert hidden.dim() == 2 and target.dim() == 1
            return torch.nn.functional.cross_entropy(hidden @ weight.T, target)

    ops.LigerSiLUMulFunction = SiLUMul  # type: ignore[attr-defined]
    modules.LigerFusedLinearCrossEntropyLoss = Loss  # type: ignore[attr-defined]
    for module in (ModuleType("liger_kernel"), ops, modules):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    loss, gradients = errors("sdpa+liger", hybrid("tiny"))
    assert loss < 1e-6 and gradients < 1e-5
    assert used == [(1.0, 1.0)] * 4


def test_rotated_rows_left_in_our_order_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    there("sdpa")
    monkeypatch.setattr(cohere2, "interleaved", lambda weight, head_dim: weight)
    assert errors("sdpa", hybrid("tiny"))[1] > 1e-2


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_takes_the_step_that_we_take_with_its_loss_or_ours(name: str, alone: None) -> None:
    there(name)
    config = peer_config(name, hybrid("tiny"))
    tokens, targets = random_batch(config, 2, 64, CPU)
    ours = our_model(config, CPU, torch.float32)
    peers = [peer_of(name, ours, 64) for _ in range(2)]
    steps = [
        our_step(our_model(config, CPU, torch.float32), tokens, targets),
        peer_step(peers[0], tokens),
        peer_step(peers[1], tokens, 1, lent_loss(peers[1], ours)),
    ]
    for _ in range(3):
        mine, whole, lent = (step() for step in steps)
        assert whole == pytest.approx(mine, rel=1e-5)
        assert lent == pytest.approx(mine, rel=1e-5)


def test_recompute_policies_fit_and_cost_the_least() -> None:
    config, tokens = hybrid("1b"), 131072
    assert parameters(config) == 1_241_548_800
    plenty = recompute.solve(config, 8192, 1e12, 8192)
    assert set(plenty) == {"none"}
    budget = 115 * 2**30
    policies = recompute.solve(config, tokens, budget, tokens)
    assert recompute.expected_bytes(config, policies, tokens) <= budget
    severity = ("none", "selective", "chunked", "full", "offload")
    worst = max(policies, key=severity.index)
    layers = [index for index, policy in enumerate(policies) if policy == worst]
    windows = [scheme.window for scheme in config.layer_plan.expand()]
    assert worst != "none" and all(windows[index] for index in layers)
    policies[layers[-1]] = "none"
    assert recompute.expected_bytes(config, policies, tokens) > budget


def test_eight_billion_parameters_fit_one_card_when_their_moments_are_off_loaded() -> None:
    config, budget = hybrid("8b"), 120 * 2**30
    assert parameters(config) == 8_028_033_024
    for offload, fits in (("none", False), ("moments", True)):
        policies = recompute.solve(config, 8192, budget, 8192, offload)
        needed = recompute.expected_bytes(config, policies, 8192, offload)
        assert (needed <= budget) == fits


def train_step(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`python -m benchmarks.train_step` in `folder`."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.train_step", *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
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
