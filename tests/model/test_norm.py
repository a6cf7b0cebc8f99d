"""Norms against their formulas, and cut over tensor ranks against whole."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megahybrid.config.attention import QKNorm
from megahybrid.errors import ConfigError
from megahybrid.model.norm import LayerNorm, QKNormModule, RMSNorm, rms_function
from megahybrid.parallel.collectives import local_slice
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.parallel.sharding import shard_spec
from tests import distributed
from tests.parallel.compare import EXACT, draw, error, gradient_errors, load

SINGLE = ParallelMesh.single()
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 6
QK_NORMS = {
    "rms-shared": QKNorm(kind="rms"),
    "layernorm-shared": QKNorm(kind="layernorm"),
    "rms-per_head": QKNorm(kind="rms", weight="per_head"),
    "layernorm-per_head": QKNorm(kind="layernorm", weight="per_head"),
    "rms-projection": QKNorm(kind="rms", over="projection"),
    "layernorm-projection": QKNorm(kind="layernorm", over="projection"),
}


def by_hand(x: Tensor, weight: Tensor, kind: str, eps: float) -> Tensor:
    """The formula, over the last axis, in float64."""
    x = x.double()
    if kind == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize(("kind", "module"), [("rms", RMSNorm), ("layernorm", LayerNorm)])
def test_norms_follow_their_formula_and_compute_bf16_in_fp32(kind: str, module: Any) -> None:
    norm = module(64, "final_norm", SINGLE, 1e-3)
    weight, x = draw("w", 64), draw("x", 5, 3, 64)
    load(norm, {"final_norm.weight": weight})
    truth = by_hand(x, norm.weight.detach(), kind, 1e-3)
    assert error(norm(x.float()).detach(), truth) < 1e-6
    assert error(norm.double()(x).detach(), by_hand(x, norm.weight.detach(), kind, 1e-3)) < 1e-14
    # One rounding of the result: a norm that computed in bf16 would be several times worse.
    norm, x = norm.bfloat16(), x.bfloat16()
    truth = by_hand(x, norm.weight.detach(), kind, 1e-3)
    assert error(norm(x).detach().double(), truth) < 2.0**-8


def test_a_norm_weight_is_described_as_replicated() -> None:
    weight = RMSNorm(8, "blocks.2.mlp_norm", SINGLE, 1e-5).weight
    (segment,) = shard_spec(weight).segments
    assert (segment.name, segment.shape, segment.dim) == ("blocks.2.mlp_norm.weight", (8,), None)
    assert weight.tensor_model_parallel is False and bool((weight == 1).all())


def norm_on_ranks(ranks: distributed.Ranks, kind: str) -> float:
    """Worst error of a norm on shards of the sequence: outputs, input and weight gradients."""
    mesh = ranks.mesh()
    module = (RMSNorm if kind == "rms" else LayerNorm)(16, "final_norm", mesh, 1e-5).double()
    weight = draw("w", 16).requires_grad_()
    x, grad = draw("x", 8, 2, 16).requires_grad_(), draw("grad", 8, 2, 16)
    load(module, {"final_norm.weight": weight.detach()})
    local = local_slice(x.detach(), mesh.tensor).requires_grad_()
    out = module(local)
    out.backward(local_slice(grad, mesh.tensor))
    truth = by_hand(x, weight, kind, 1e-5)
    truth.backward(grad)
    assert local.grad is not None and x.grad is not None and weight.grad is not None
    return max(
        error(out.detach(), local_slice(truth.detach(), mesh.tensor)),
        error(local.grad, local_slice(x.grad, mesh.tensor)),
        *gradient_errors(module, {"final_norm.weight": weight.grad}).values(),
    )


@pytest.mark.parametrize("kind", ["rms", "layernorm"])
def test_a_norm_on_sequence_shards_equals_the_whole(kind: str) -> None:
    assert max(distributed.run(2, norm_on_ranks, kind)) < EXACT


def qk_by_hand(x: Tensor, weight: Tensor, qk_norm: QKNorm) -> Tensor:
    """[seq, batch, heads, head_dim] with all heads, weight canonical."""
    if qk_norm.over == "projection":
        return by_hand(x.flatten(-2), weight, qk_norm.kind, 1e-5).unflatten(-1, x.shape[-2:])
    return by_hand(x, weight, qk_norm.kind, 1e-5)


def kv_heads_of(rank: int, degree: int) -> slice:
    """The KV heads that a tensor rank holds."""
    if degree <= KV_HEADS:
        return slice(rank * KV_HEADS // degree, (rank + 1) * KV_HEADS // degree)
    return slice(rank * KV_HEADS // degree, rank * KV_HEADS // degree + 1)


def qk_norm_on_ranks(ranks: distributed.Ranks, kind: str, dtype: torch.dtype) -> dict[str, float]:
    """Errors of a QK-norm on this rank's heads."""
    mesh = SINGLE if ranks.world_size == 1 else ranks.mesh()
    rank, degree = mesh.tensor.rank, mesh.tensor.size
    norm = QKNormModule(QK_NORMS[kind], HEADS, KV_HEADS, HEAD_DIM, "a", mesh, 1e-5).to(dtype)
    full = {
        shard_spec(p).segments[0].name: draw(n, *shard_spec(p).segments[0].shape).requires_grad_()
        for n, p in norm.named_parameters()
    }
    load(norm, {name: value.detach() for name, value in full.items()})
    whole = [draw(f"{kind}{heads}", 5, 2, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS)]
    grads = [draw(f"grad{heads}", 5, 2, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS)]
    queries = slice(rank * HEADS // degree, (rank + 1) * HEADS // degree)
    mine = (queries, kv_heads_of(rank, degree))
    local = [x[:, :, s].to(dtype).requires_grad_() for x, s in zip(whole, mine, strict=True)]
    outs = norm(*local)
    copies = max(1, degree // KV_HEADS)  # ranks that hold the same KV head share its gradient
    for out, grad, part, share in zip(outs, grads, mine, (1, copies), strict=True):
        out.backward(grad[:, :, part].to(dtype) / share, retain_graph=True)

    errors = {}
    names = ("a.query_norm.weight", "a.key_norm.weight")
    for name, x, grad, part, out, got in zip(names, whole, grads, mine, outs, local, strict=True):
        x.requires_grad_()
        truth = qk_by_hand(x, full[name], QK_NORMS[kind])
        truth.backward(grad)
        assert x.grad is not None and got.grad is not None
        errors[f"{name} output"] = error(out.detach().double(), truth.detach()[:, :, part])
        if part is mine[0] or copies == 1:
            errors[f"{name} input"] = error(got.grad.double(), x.grad[:, :, part])
    canonical = {name: value.grad for name, value in full.items() if value.grad is not None}
    return errors | gradient_errors(norm, {n: g.to(dtype) for n, g in canonical.items()})


@pytest.mark.parametrize("kind", QK_NORMS)
@pytest.mark.parametrize("tensor", [1, 2, 4], ids=lambda degree: f"tensor{degree}")
def test_qk_norm_on_any_tensor_degree_equals_the_formula(kind: str, tensor: int) -> None:
    if tensor == 1:
        results = [qk_norm_on_ranks(distributed.Ranks(0, 1), kind, torch.float64)]
    else:
        results = distributed.run(tensor, qk_norm_on_ranks, kind, torch.float64)
    for errors in results:
        assert max(errors.values()) < EXACT, errors


@pytest.mark.parametrize("kind", QK_NORMS)
def test_qk_norm_computes_bf16_in_fp32(kind: str) -> None:
    norm = QKNormModule(QK_NORMS[kind], HEADS, KV_HEADS, HEAD_DIM, "a", SINGLE, 1e-5).bfloat16()
    q, k = (draw(f"{n}", 50, 2, n, HEAD_DIM).bfloat16() for n in (HEADS, KV_HEADS))
    out, _ = norm(q, k)
    truth = qk_by_hand(q, norm.query_weight.detach(), QK_NORMS[kind])
    assert out.dtype == torch.bfloat16
    assert error(out.detach().double(), truth) < 2.0**-8


def test_the_wrong_apex_gets_a_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = ModuleType("apex")
    wrong.__file__ = "/site-packages/apex/__init__.py"
    monkeypatch.setitem(sys.modules, "apex", wrong)
    with pytest.raises(ConfigError, match="is not NVIDIA apex but PyPI's package of that name"):
        rms_function("apex")


def test_a_missing_apex_gets_a_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(ConfigError, match="kernels.norm=apex is not installed"):
        rms_function("apex")


def test_nvidia_apex_is_found_by_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    package, normalization = ModuleType("apex"), ModuleType("apex.normalization")
    fused = ModuleType("apex.normalization.fused_layer_norm")
    package.__file__ = "apex/__init__.py"
    normalization.FusedRMSNorm = object  # type: ignore[attr-defined]
    fused.fused_rms_norm_affine = lambda x, weight, shape, eps: torch.nn.functional.rms_norm(  # type: ignore[attr-defined]
        x, shape, weight, eps
    )
    for module in (package, normalization, fused):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    x = draw("x", 3, 8)
    weight = draw("w", 8)
    assert torch.equal(
        rms_function("apex")(x, weight, 1e-5), rms_function("torch")(x, weight, 1e-5)
    )


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ConfigError, match="kernels.norm=triton is not known"):
        rms_function("triton")


@pytest.mark.gpu
def test_apex_and_torch_agree() -> None:
    try:
        fused = rms_function("apex")
    except ConfigError as error_:
        pytest.skip(str(error_))
    x, weight = draw("x", 64, 256).float().cuda(), draw("w", 256).float().cuda()
    assert error(fused(x, weight, 1e-5), rms_function("torch")(x, weight, 1e-5)) < 1e-6
