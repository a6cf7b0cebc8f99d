"""The positional self-test passes what is right and names what is broken."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megahybrid.config.attention import (
    AttentionScheme,
    FixedScale,
    Llama4Scale,
    LogScale,
    Nope,
    Rope,
    SsmaxScale,
)
from megahybrid.config.scaling import LinearScaling, Llama3Scaling, NtkScaling, YarnScaling
from megahybrid.errors import AuditError
from megahybrid.model import logit_scale, mixing, selftest
from megahybrid.model.kernels import attend
from megahybrid.model.rotary import RotaryTable, rotate

CPU = torch.device("cpu")
NOPE = Nope(kind="nope")


def rope(theta: float = 10000.0, **fields: Any) -> Rope:
    """A Rope value."""
    return Rope(kind="rope", theta=theta, **fields)


SCHEMES = {
    "rope-window": AttentionScheme(position=rope(), window=64),
    "rope-window-prime": AttentionScheme(position=rope(theta=500.0), window=211),
    "rope-window-1": AttentionScheme(position=rope(), window=1),
    "nope-window-2": AttentionScheme(position=NOPE, window=2),
    "nope": AttentionScheme(position=NOPE),
    "rope-partial": AttentionScheme(position=rope(rotary_fraction=0.5)),
    "rope-linear": AttentionScheme(position=rope(scaling=LinearScaling(kind="linear", factor=16))),
    "rope-ntk": AttentionScheme(position=rope(scaling=NtkScaling(kind="ntk", factor=4))),
    "rope-llama3": AttentionScheme(
        position=rope(scaling=Llama3Scaling(kind="llama3", factor=8, original_length=64))
    ),
    "rope-yarn": AttentionScheme(
        position=rope(scaling=YarnScaling(kind="yarn", factor=8, original_length=64)), window=100
    ),
    "nope-llama4": AttentionScheme(position=NOPE, logit_scale=Llama4Scale(kind="llama4")),
    "nope-log": AttentionScheme(
        position=NOPE, window=33, logit_scale=LogScale(kind="log", base=1024)
    ),
    "nope-ssmax": AttentionScheme(position=NOPE, logit_scale=SsmaxScale(kind="ssmax")),
    "rope-fixed": AttentionScheme(position=rope(), logit_scale=FixedScale(kind="fixed", scale=0.1)),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def check(name: str, dtype: torch.dtype = torch.float32, head_dim: int = 32) -> None:
    """The self-test of one scheme."""
    selftest.run_self_test({name: SCHEMES[name]}, head_dim, dtype, CPU, {name: "auto"}, rank=3)


@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_passes(name: str, dtype: str, head_dim: int) -> None:
    check(name, DTYPES[dtype], head_dim)


def test_the_report_says_which_kernel_each_scheme_had() -> None:
    schemes = {name: SCHEMES[name] for name in ("rope-window", "nope")}
    kernels = {"rope-window": "reference", "nope": "auto"}
    report = selftest.run_self_test(schemes, 16, torch.float32, CPU, kernels, rank=0)
    assert [line[:2] for line in report] == [("rope-window", "reference"), ("nope", "sdpa")]


def test_it_draws_nothing_from_the_run() -> None:
    before = torch.get_rng_state()
    check("rope-window")
    assert torch.equal(torch.get_rng_state(), before)


def no_mask(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of every query to every key."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("ibhd,jbhd->bhij", q, k) * scale
    return torch.einsum("bhij,jbhd->ibhd", scores.softmax(-1), v)


def shifted(by: int) -> Callable[..., Tensor]:
    """A kernel whose window is off by `by`."""

    def broken(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        how["window"] += by
        return attend(q, k, v, **how)

    return broken


def future(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """A kernel that is not causal."""
    return no_mask(q, k, v, how["scale"])


def joined(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """A kernel that ignores documents."""
    return attend(q, k, v, **{**how, "documents": None})


def full(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """A kernel that ignores the window."""
    return attend(q, k, v, **{**how, "window": None, "kernel": "sdpa"})


def interleaved_groups(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """A kernel that deals KV heads out in turns instead of in groups."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat(1, 1, group, 1) for x in (k, v))
    return attend(q, k, v, **how)


def backward_of(wrong: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The right output, with the gradients of a broken kernel."""

    def broken(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        other = wrong(q, k, v, **how)
        return other + (attend(q, k, v, **how) - other).detach()

    return broken


def of_one_head(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """Keys and values whose gradients come from the first query head of each group alone."""
    group = q.shape[2] // k.shape[2]
    first = torch.arange(q.shape[2], device=q.device)[:, None] % group == 0
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    k, v = (torch.where(first, x, x.detach()) for x in (k, v))
    return attend(q, k, v, **how)


def overflowing(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """A kernel whose gradients are NaN where scores are low, as cuDNN's are under a mask."""
    low = (q.detach() * k.detach()[:, :, :1]).sum(-1).mean() * how["scale"] < -88.7
    return attend(q * float("nan") if low else q, k, v, **how)


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
    "backward-window-one-long": ("rope-window", backward_of(shifted(1)), "gradient of queries"),
    "backward-window-one-short": ("nope-log", backward_of(shifted(-1)), "gradient of queries"),
    "backward-window-ignored": ("rope-window-prime", backward_of(full), "one document"),
    "backward-documents-ignored": ("nope", backward_of(joined), "several documents"),
    "backward-of-low-scores": ("nope", backward_of(overflowing), "computes what is no number"),
    "backward-groups": ("rope-llama3", backward_of(of_one_head), "gradient of keys"),
}


@pytest.mark.parametrize("fault", KERNEL_FAULTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_broken_kernel_is_named(fault: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, broken, words = KERNEL_FAULTS[fault]
    monkeypatch.setattr(mixing, "attend", broken)
    with pytest.raises(AuditError) as caught:
        check(name, DTYPES[dtype])
    message = str(caught.value)
    assert message.startswith(f"self-test: scheme '{name}' with kernel ") and "rank 3" in message
    assert words in message


def always_turned(q: Tensor, k: Tensor, position: Any, context: Any) -> tuple[Tensor, Tensor]:
    """A NoPE layer that rotates."""
    table = context.rotary_table(rope(), q.shape[-1])
    return rotate(q, table), rotate(k, table)


def queries_alone(q: Tensor, k: Tensor, position: Any, context: Any) -> tuple[Tensor, Tensor]:
    """Queries turned by their absolute phase, keys not at all."""
    return rotate(q, context.rotary_table(position, q.shape[-1])), k


def keys_backwards(q: Tensor, k: Tensor, position: Any, context: Any) -> tuple[Tensor, Tensor]:
    """Keys turned against the queries, so that scores know the sum of positions."""
    table = context.rotary_table(position, q.shape[-1])
    return rotate(q, table), rotate(k, RotaryTable(table.cos, -table.sin))


def keys_one_ahead(q: Tensor, k: Tensor, position: Any, context: Any) -> tuple[Tensor, Tensor]:
    """Keys turned as if one position further."""
    table = context.rotary_table(position, q.shape[-1])
    ahead = RotaryTable(table.cos.roll(-1, 0), table.sin.roll(-1, 0))
    return rotate(q, table), rotate(k, ahead)


def other_theta(q: Tensor, k: Tensor, position: Any, context: Any) -> tuple[Tensor, Tensor]:
    """Another theta than the scheme's."""
    table = context.rotary_table(position.model_copy(update={"theta": 5e5}), q.shape[-1])
    return rotate(q, table), rotate(k, table)


def untouched(q: Tensor, k: Tensor, position: Any, context: Any) -> tuple[Tensor, Tensor]:
    """A RoPE layer that does not rotate."""
    return q, k


def never_restarting(q: Tensor, k: Tensor, position: Any, context: Any) -> tuple[Tensor, Tensor]:
    """Positions that run on through documents."""
    table = RotaryTable.build(position, q.shape[-1], q.shape[0], None, q.device, q.dtype)
    return rotate(q, table), rotate(k, table)


ROTATION_FAULTS = {
    "nope-rotates": ("nope", always_turned, "is not blind to position"),
    "nope-window-rotates": ("nope-log", always_turned, "is not blind to position"),
    "absolute-queries": ("rope-window", queries_alone, "is not blind to a common shift"),
    "absolute-sum": ("rope-window", keys_backwards, "is not blind to a common shift"),
    "keys-one-ahead": ("rope-partial", keys_one_ahead, "does not turn by position * frequency"),
    "other-theta": ("rope-window", other_theta, "does not turn by position * frequency"),
    "rope-does-not-rotate": ("rope-yarn", untouched, "does not turn by position * frequency"),
    "documents-run-on": ("rope-window", never_restarting, "does not restart its positions"),
}


@pytest.mark.parametrize("fault", ROTATION_FAULTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_broken_rotation_is_named(
    fault: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, broken, words = ROTATION_FAULTS[fault]
    monkeypatch.setattr(mixing, "positioned", broken)
    monkeypatch.setattr(selftest, "positioned", broken)
    with pytest.raises(AuditError, match=words.replace("*", r"\*")):
        check(name, DTYPES[dtype])


@pytest.mark.parametrize("name", ["nope-llama4", "nope-log", "nope-ssmax"])
def test_a_wrong_query_factor_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = logit_scale.query_factor

    def one_late(scale: Any, window: Any, documents: Any, length: int, device: Any) -> Tensor:
        return right(scale, window, documents, length, device).roll(1, 0)

    monkeypatch.setattr(logit_scale, "query_factor", one_late)
    with pytest.raises(AuditError, match="scales the query at position"):
        check(name)


def test_a_window_and_head_of_a_real_run_take_about_a_second() -> None:
    schemes = {
        "local": AttentionScheme(position=rope(theta=50000.0), window=4096),
        "global": AttentionScheme(position=NOPE),
    }
    kernels = {"local": "auto", "global": "auto"}
    report = selftest.run_self_test(schemes, 128, torch.bfloat16, CPU, kernels, rank=0)
    assert sum(seconds for _, _, seconds in report) < 20  # 0.5 s on an idle core
