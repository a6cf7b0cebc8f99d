"""Learned sinks around varlen: the packed sums are laid out as heads are, and a backward that has
FlashAttention's rule, from the output and the sums alone, gives the exact gradients."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megahybrid.model.core_attention import attention_backward, attention_forward
from megahybrid.model.kernels import AttentionSpec, attend, varlen
from megahybrid.parallel.mesh import ParallelMesh
from tests.model.test_sinks import ASKED, DOCUMENTS, NAMES, SCALE, explicit, leaves
from tests.plain_model import relative_error


def documents_of(
    packed: tuple[Tensor, ...], edges: tuple[Tensor, Tensor], left: int, scale: float
) -> Iterator[tuple[slice, slice, list[Tensor], Tensor]]:
    """(queries, keys, q, k and v [heads, tokens, head_dim], scores) of each packed document."""
    q = packed[0]
    for number in range(len(edges[0]) - 1):
        queries, keys = (slice(int(of[number]), int(of[number + 1])) for of in edges)
        parts = [q[queries], *(x[keys] for x in packed[1:3])]
        q_, k_, v_ = (
            x.repeat_interleave(q.shape[1] // x.shape[1], 1).transpose(0, 1) for x in parts
        )
        own = torch.arange(k_.shape[1] - q_.shape[1], k_.shape[1])[:, None]
        key = torch.arange(k_.shape[1])
        seen = (key <= own) & (key >= own - (left if left >= 0 else k_.shape[1]))
        scores = (q_ @ k_.mT * scale).masked_fill(~seen, -torch.inf)
        yield queries, keys, [q_, k_, v_], scores


def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **how: Any) -> tuple[Any, ...]:
    """torch's operator beneath varlen_attn: output, and sums [heads, packed tokens]."""
    out, sums = torch.empty_like(q), q.new_empty(q.shape[1], len(q))
    left, scale = how["window_size_left"], how["scale"]
    for queries, _, (_, _, values), scores in documents_of((q, k, v), rest[:2], left, scale):
        out[queries] = (scores.softmax(-1) @ values).transpose(0, 1)
        sums[:, queries] = scores.logsumexp(-1)
    return out, sums, None, None, None


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, *rest: Any, **how: Any
) -> tuple[Tensor, ...]:
    """FlashAttention's rule: probabilities from scores and sums, and <grad, out> in place of their
    sum with what they are multiplied by."""
    by_q, by_k, by_v = (torch.zeros_like(x) for x in (q, k, v))
    left, scale = how["window_size_left"], how["scale"]
    for some, keys, heads, scores in documents_of((q, k, v), rest[:2], left, scale):
        p = (scores - sums[:, some, None]).exp()
        g, o = (x[some].transpose(0, 1) for x in (grad, out))
        by_score = p * (g @ heads[2].mT - (g * o).sum(-1, keepdim=True)) * scale
        by_q[some] = (by_score @ heads[1]).transpose(0, 1)
        for whole, part in ((by_k, by_score.mT @ heads[0]), (by_v, p.mT @ g)):
            whole[keys] = part.unflatten(0, (k.shape[1], -1)).sum(1).transpose(0, 1)
    return by_q, by_k, by_v


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's FlashAttention by the rules above, on a CPU."""
    monkeypatch.setattr(varlen, "refusal", lambda *where: None)
    monkeypatch.setattr(varlen, "_shares_heads", lambda *where: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    yield
    varlen.plain_boundaries.cache_clear()


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.usefixtures("packed")
def test_packed_sums_and_outputs_with_sinks_give_every_gradient(asked: str) -> None:
    spec = AttentionSpec(scale=SCALE, **ASKED[asked])
    before = spec.before or 0
    q, k, v, sinks, grad = leaves(before=before)
    wanted = explicit(q, k, v, sinks, grad, spec)
    sunk = replace(spec, sinks=sinks)
    out = attend(q, k, v, sunk, "varlen")
    found = [out.detach(), *torch.autograd.grad(out, (q, k, v, sinks), grad)]
    with torch.no_grad():
        out, kept = attention_forward(q, k, v, sunk, "varlen")
        apart = [out, *attention_backward(grad, q, k, v, out, kept, sunk, "varlen")]
    for ours in (found, apart):
        for name, one, right in zip(NAMES, ours, wanted, strict=True):
            assert one is not None and relative_error(one, right) < 1e-12, name


def on_a_card(dtype: torch.dtype, documents: bool, window: int | None) -> dict[str, float]:
    """How far varlen's numbers on a GPU are from the explicit softmax in float64."""
    docs = DOCUMENTS if documents else None
    spec = AttentionSpec(scale=SCALE, window=window, documents=docs)
    wanted = explicit(*(x.to(dtype).double().detach().requires_grad_() for x in leaves()), spec)
    device = ParallelMesh.single("cuda").device
    *inputs, grad = (x.detach().to(device, dtype) for x in leaves())
    q, k, v = (x.requires_grad_() for x in inputs[:3])
    sinks = inputs[3].float().requires_grad_()
    there = None if docs is None else docs.to(device)
    out = attend(q, k, v, replace(spec, documents=there, sinks=sinks), "varlen")
    found = [out, *torch.autograd.grad(out, (q, k, v, sinks), grad)]
    pairs = zip(NAMES, found, wanted, strict=True)
    return {name: relative_error(ours.cpu(), right) for name, ours, right in pairs}


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("documents", [False, True])
def test_varlen_on_a_card_has_the_sinks_gradients(documents: bool, window: int | None) -> None:
    """Heads of 8 are what FlashAttention serves at the least."""
    errors = on_a_card(torch.bfloat16, documents, window)
    assert max(errors.values()) < 0.03, errors
