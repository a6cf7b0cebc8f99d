"""The MLP in chunks: the same function at every tensor degree, and never a whole gate or up."""

from typing import Any, get_args
from unittest import mock

import pytest
import torch
from torch import Tensor

from megahybrid.config import chunk_sizes
from megahybrid.config.model import Activation
from megahybrid.model import chunked_mlp
from megahybrid.model.mlp import gated_product
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh
from tests import distributed
from tests.parity.cases import BLOCKS, model
from tests.parity.test_engine import Case, RankRun, engine_run, plain_run
from tests.parity.test_engine import errors as engine_errors
from tests.parity.test_layers import BOUND, case_errors
from tests.plain_model import random_tensors

CHUNK = 6  # tokens; not a divisor of the batch's
POLICIES = ("chunked", "full", "offload")


def errors_in_chunks(ranks: distributed.Ranks, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`case_errors` of each case, and how often its MLPs went backward in chunks."""
    found = {}
    for name, case in cases.items():
        with (
            mock.patch.object(chunk_sizes, "CHUNK_TOKENS", CHUNK),
            mock.patch.object(chunked_mlp, "_of_chunks", wraps=chunked_mlp._of_chunks) as backward,
        ):
            found[name] = case_errors(ranks.mesh(), **case) | {"calls": backward.call_count}
    return found


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_the_mlp_in_chunks_is_the_plain_model(tensor: int) -> None:
    # Each block meets each policy at one degree. With fewer KV heads than ranks their weights are
    # replicated: outputs of their own beside the fused ones.
    cases = {
        f"{block}-{(policy := POLICIES[(index + tensor.bit_length()) % 3])}": {
            "config": model("rms-shared", block, "rms", kv_heads=1),
            "recompute": policy,
        }
        for index, block in enumerate(BLOCKS)
    }
    for of_rank in distributed.run(tensor, errors_in_chunks, cases):
        for name, errors in of_rank.items():
            assert errors.pop("calls") == 2, f"{name}: one backward for each of two layers"
            assert max(errors.values()) < BOUND, (name, max(errors, key=lambda n: errors[n]))


def runs_in_chunks(ranks: distributed.Ranks, cases: list[Case]) -> list[RankRun]:
    with mock.patch.object(chunk_sizes, "CHUNK_TOKENS", CHUNK):
        return [engine_run(ranks, case) for case in cases]


def test_the_engine_trains_an_mlp_in_chunks_at_every_zero_stage() -> None:
    cases = [
        Case(model("rnope_swa", "parallel"), 2, 1, 3, recompute="chunked"),
        Case(model("rms-shared", "pre_norm", "rms"), 2, 1, 2, recompute="full"),
        Case(model("rope", "post_norm"), 1, 2, 3, recompute="offload"),
        Case(model("rms-shared", "parallel"), 1, 2, 3, recompute="chunked"),
    ]
    runs = distributed.run(2, runs_in_chunks, cases)
    for index, case in enumerate(cases):
        found = engine_errors(case, [of_rank[index] for of_rank in runs], plain_run(case))
        assert max(found.values()) < 1e-5, (case, found)


def gradients(block: str, policies: list[str], dtype: torch.dtype) -> dict[str, Tensor]:
    config = model("rnope_swa", block)
    tokens = torch.randint(config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    built = Transformer(config, ParallelMesh.single(), recompute=policies)
    built.load_canonical(random_tensors(config, 0, torch.float32))
    loss, _ = built.to(dtype)(tokens, tokens)
    loss.backward()
    return {n: p.grad.double() for n, p in built.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("block", BLOCKS)
def test_in_bf16_chunks_lose_no_more_than_the_whole(
    block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_sizes, "CHUNK_TOKENS", CHUNK)
    truth = gradients(block, ["none"] * 2, torch.float64)
    plain = gradients(block, ["none"] * 2, torch.bfloat16)
    chunked = gradients(block, ["chunked"] * 2, torch.bfloat16)
    assert chunked.keys() == truth.keys()
    for name, true in truth.items():
        assert (chunked[name] - true).norm() <= 1.5 * (plain[name] - true).norm(), name


@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunks_slopes_take_the_place_of_gate_and_up(
    dtype: torch.dtype, activation: Activation
) -> None:
    whole, chunk = gated_product(activation), chunked_mlp.between(activation)
    generator = torch.Generator().manual_seed(1)
    both, grad = (torch.randn(7, width, generator=generator).to(dtype) for width in (128, 64))
    gate, up = (half.clone().requires_grad_() for half in both.chunk(2, dim=-1))
    made = whole(gate.unsqueeze(1), up.unsqueeze(1)).squeeze(1)
    made.backward(grad)
    assert torch.equal(chunk.gated(gate.detach(), up.detach()), made)
    assert torch.equal(chunk.gradients(*both.chunk(2, dim=-1), grad), made)
    assert gate.grad is not None and up.grad is not None
    assert torch.equal(both, torch.cat((gate.grad, up.grad), dim=-1))


def test_a_short_sequence_is_not_cut_under_full(monkeypatch: pytest.MonkeyPatch) -> None:
    for chunk, calls in ((80, 0), (79, 2)):
        monkeypatch.setattr(chunk_sizes, "CHUNK_TOKENS", chunk)
        with mock.patch.object(chunked_mlp, "_of_chunks", wraps=chunked_mlp._of_chunks) as backward:
            gradients("parallel", ["full"] * 2, torch.float32)
        assert backward.call_count == calls


@pytest.mark.parametrize("block", ["pre_norm", "parallel"])
def test_a_layer_computed_again_leaves_its_mlp_out(
    block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_sizes, "CHUNK_TOKENS", CHUNK)
    seen: list[bool] = []
    forward = chunked_mlp.ChunkedMLP.forward

    def watched(self: Any, x: Tensor, needed: bool = True) -> Any:
        seen.append(needed)
        return forward(self, x, needed)

    monkeypatch.setattr(chunked_mlp.ChunkedMLP, "forward", watched)
    gradients(block, ["full", "none"], torch.float32)
    assert seen == [True, False]
