"""Broken attention kernels, each of which the self-test must refuse by the law that it breaks."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megahybrid.errors import AuditError
from megahybrid.model import core_attention
from megahybrid.model.kernels import AttentionSpec, attend
from tests.model.test_selftest import check

Patch = pytest.MonkeyPatch


def no_mask(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of every query to every key."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("ibhd,jbhd->bhij", q, k) * scale
    return torch.einsum("bhij,jbhd->ibhd", scores.softmax(-1), v)


def shifted(by: int) -> Callable[..., Tensor]:
    """A kernel whose window is off by `by`."""

    def broken(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, kernel: str) -> Tensor:
        assert spec.window is not None
        return attend(q, k, v, replace(spec, window=spec.window + by), kernel)

    return broken


def future(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, kernel: str) -> Tensor:
    """A kernel that is not causal."""
    return no_mask(q, k, v, spec.scale)


def joined(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, kernel: str) -> Tensor:
    """A kernel that ignores documents."""
    return attend(q, k, v, replace(spec, documents=None), kernel)


def full(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, kernel: str) -> Tensor:
    """A kernel that ignores the window."""
    return attend(q, k, v, replace(spec, window=None), "sdpa")


def interleaved_groups(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, kernel: str) -> Tensor:
    """A kernel that deals KV heads out in turns instead of in groups."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat(1, 1, group, 1) for x in (k, v))
    return attend(q, k, v, spec, kernel)


def backward_of(wrong: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The right output, with the gradients of a broken kernel."""

    def broken(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, kernel: str) -> Tensor:
        other = wrong(q, k, v, spec, kernel)
        return other + (attend(q, k, v, spec, kernel) - other).detach()

    return broken


def of_one_head(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, kernel: str) -> Tensor:
    """Keys and values whose gradients come from the first query head of each group alone."""
    group = q.shape[2] // k.shape[2]
    first = torch.arange(q.shape[2], device=q.device)[:, None] % group == 0
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    k, v = (torch.where(first, x, x.detach()) for x in (k, v))
    return attend(q, k, v, spec, kernel)


def overflowing(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, kernel: str) -> Tensor:
    """A kernel whose gradients are NaN where scores are low, as cuDNN's are under a mask."""
    low = (q.detach() * k.detach()[:, :, :1]).sum(-1).mean() * spec.scale < -88.7
    return attend(q * float("nan") if low else q, k, v, spec, kernel)


KERNEL_FAULTS = {
    "window-one-short": ("rope-window", shifted(-1), "does not see exactly window=64 keys"),
    "window-one-long": ("rope-window", shifted(1), "does not see exactly window=64 keys"),
    "window-one-short-nope": ("nope-window-2", shifted(-1), "does not see exactly window=2 keys"),
    "window-ignored": ("rope-window", full, "does not see exactly window=64 keys"),
    "not-causal": ("nope", future, "is not causal"),
    "not-causal-rope": ("rope-partial", future, "is not causal"),
    "documents-ignored": ("rope-llama3", joined, "mixes documents"),
    "documents-ignored-window": ("rope-window", joined, "mixes documents"),
    "documents-ignored-nope": ("nope", joined, "mixes documents"),
    "groups": ("rope-window", interleaved_groups, "does not read KV head"),
    "backward-window-one-long": ("rope-window", backward_of(shifted(1)), "gradient of"),
    "backward-window-one-short": ("nope-log", backward_of(shifted(-1)), "gradient of"),
    "backward-window-ignored": ("rope-window-prime", backward_of(full), "gradient of"),
    "backward-documents-ignored": ("nope", backward_of(joined), "gradient of"),
    "backward-of-low-scores": ("nope", backward_of(overflowing), "computes what is no number"),
    "backward-groups": ("rope-llama3", backward_of(of_one_head), "gradient of keys"),
}


@pytest.mark.parametrize("fault", KERNEL_FAULTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_broken_kernel_is_named(fault: str, dtype: str, monkeypatch: Patch) -> None:
    name, broken, words = KERNEL_FAULTS[fault]
    monkeypatch.setattr(core_attention, "attend", broken)
    with pytest.raises(AuditError) as caught:
        check(name, dtype=dtype)
    message = str(caught.value)
    assert message.startswith(f"self-test: scheme '{name}' with kernel ") and "rank 3" in message
    assert words in message
