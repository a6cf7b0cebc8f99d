"""Learned sinks around every kernel that serves them, against the explicit softmax in float64; and
what autograd alone would make of a fused kernel's sums."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megahybrid.config import check_run
from megahybrid.config.check import WITHOUT_SINKS
from megahybrid.errors import AuditError, ConfigError
from megahybrid.model import core_attention
from megahybrid.model.core_attention import attention_backward, attention_forward
from megahybrid.model.kernels import AttentionSpec, Documents, Place, attend
from megahybrid.model.kernels.choice import candidates, kinds_with_sinks, resolve_kernels
from megahybrid.model.kernels.kernel import Kernel
from megahybrid.model.kernels.last_queries import forward_on_cpu
from megahybrid.model.kernels.registry import REGISTRY
from megahybrid.model.kernels.sinks import gradient_of_sinks, written_out
from megahybrid.model.selftest import HeadShape, run_self_test
from tests.config.example import example
from tests.parity import cases
from tests.plain_model import relative_error

SEQ, HEADS, KV_HEADS, HEAD_DIM, SCALE = 150, 4, 2, 8, 0.4
DOCUMENTS = Documents.from_lengths([[SEQ], [60, 1, SEQ - 61]])
NAMES = ("output", "dq", "dk", "dv", "dc")
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 0.02}


def leaves(dtype: torch.dtype = torch.float64, before: int = 0) -> list[Tensor]:
    """q, k, v, sinks that take from a hundredth to nearly all, and a gradient of the output."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads = (draw(SEQ - before, 2, HEADS, HEAD_DIM), draw(SEQ, 2, KV_HEADS, HEAD_DIM))
    drawn = [*heads, draw(SEQ, 2, KV_HEADS, HEAD_DIM), torch.tensor([-1.0, 1.0, 3.0, 9.0])]
    made = [x.double().to(dtype).requires_grad_() for x in drawn]
    return [*made, draw(SEQ - before, 2, HEADS, HEAD_DIM).to(dtype)]


def explicit(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, grad: Tensor, spec: AttentionSpec
) -> list[Tensor]:
    """The softmax over the scores and the sink, written once more; its gradients."""
    documents = spec.documents or Documents(torch.zeros(2, SEQ, dtype=torch.int64))
    seen = documents.visible(spec.window)[:, spec.before or 0 :]
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 2) for x in (k, v))
    scores = torch.einsum("ibhd,jbhd->bhij", q, keys) * spec.scale
    masses = scores.exp() * seen[:, None]
    weights = masses / (masses.sum(-1, keepdim=True) + sinks.exp()[:, None, None])
    out = torch.einsum("bhij,jbhd->ibhd", weights, values)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v, sinks), grad)]


def computed(kernel: str, dtype: torch.dtype, spec: AttentionSpec) -> list[Tensor]:
    q, k, v, sinks, grad = leaves(dtype, spec.before or 0)
    out = attend(q, k, v, replace(spec, sinks=sinks), kernel)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v, sinks), grad)]


ASKED: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"window": 20},
    "documents": {"documents": DOCUMENTS},
    "window-documents": {"window": 20, "documents": DOCUMENTS},
    "before": {"before": 40},
    "window-before-documents": {"window": 20, "before": 40, "documents": DOCUMENTS},
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("kernel", ["reference", "sdpa", "blocked"])
def test_output_and_every_gradient_are_those_of_the_explicit_softmax(
    kernel: str, asked: str
) -> None:
    spec = AttentionSpec(scale=SCALE, **ASKED[asked])
    if "window" in ASKED[asked] and kernel == "sdpa":
        with pytest.raises(ConfigError, match="kernels=sdpa has no window"):
            computed(kernel, torch.float64, spec)
        return
    wanted = explicit(*leaves(before=spec.before or 0), spec)
    for dtype, bound in BOUNDS.items():
        found = computed(kernel, dtype, spec)
        for name, ours, right in zip(NAMES, found, wanted, strict=True):
            assert relative_error(ours, right) < bound, (dtype, name)


def test_check_refuses_by_config_alone_the_kernels_that_never_have_sums_for_sinks() -> None:
    never = [
        name
        for name, kernel in REGISTRY.items()
        if "sinks" not in kernel.serves and kernel.sums is Kernel.sums
    ]
    assert sorted(never) == sorted(WITHOUT_SINKS)
    sink = "model.layer_plan.schemes.global.sink=true"
    for run in (example("kernels.full=cudnn"), example(sink, "kernels.windowed=fa3")):
        check_run(run)
    with pytest.raises(ConfigError, match=r"^kernels.full=cudnn has no learned sinks .*Use auto"):
        check_run(example(sink, "kernels.full=cudnn"))


def test_autograd_through_a_fused_kernels_sums_would_train_wrong_queries_and_keys() -> None:
    """The trap: fused kernels, varlen and a CPU's, drop the gradient of the sums that they give.
    With o * sigmoid(l - c) the output is right, and the gradients of q and k are not."""
    q, k, v, sinks, grad = leaves()
    by_head = [x.permute(1, 2, 0, 3) for x in (q, k, v)]
    out, sums = forward_on_cpu(*by_head, None, SCALE)
    naive = out * torch.sigmoid(sums - sinks[:, None])[..., None]
    naive = naive.permute(2, 0, 1, 3)
    found = [naive.detach(), *torch.autograd.grad(naive, (q, k, v, sinks), grad)]
    errors = dict(zip(NAMES, _errors(found, explicit(*leaves(), _plain())), strict=True))
    assert errors["output"] < 1e-12 and errors["dv"] < 1e-12
    assert errors["dq"] > 0.05 and errors["dk"] > 0.05


def _plain() -> AttentionSpec:
    return AttentionSpec(scale=SCALE)


def _errors(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[float]:
    return [relative_error(ours, right) for ours, right in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("kernel", ["reference", "sdpa", "blocked"])
def test_forward_and_backward_apart_have_the_sinks_gradient_too(
    kernel: str, window: int | None
) -> None:
    """Context ranks that gather keys run both apart, where a kernel can and where it cannot."""
    if window and kernel == "sdpa":
        return
    q, k, v, sinks, grad = (x.detach() for x in leaves())
    spec = AttentionSpec(scale=SCALE, window=window, sinks=sinks)
    out, kept = attention_forward(q, k, v, spec, kernel)
    found = [out, *attention_backward(grad, q, k, v, out, kept, spec, kernel)]
    wanted = explicit(*leaves(), replace(spec, sinks=None))
    assert max(_errors(found, wanted)) < 1e-12  # type: ignore[arg-type]


def test_keys_given_one_by_one_are_served_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, sinks, _ = (x.detach() for x in leaves(before=40))
    visible = DOCUMENTS.visible(20)[:, 40:]
    spec = AttentionSpec(scale=SCALE, visible=visible, sinks=sinks)
    wanted = attend(
        q, k, v, AttentionSpec(scale=SCALE, window=20, before=40, documents=DOCUMENTS, sinks=sinks)
    )
    monkeypatch.setattr("megahybrid.model.kernels.masked.SCORE_BYTES", 7 * 8 * SEQ * HEADS * 2)
    assert relative_error(attend(q, k, v, spec), wanted) < 1e-12


def test_a_sink_far_below_the_scores_takes_nothing_to_the_bit() -> None:
    """-1e9 is how released models switch them off; exp of it is 0."""
    q, k, v, *_ = (x.detach() for x in leaves(torch.float32))
    off = torch.full((HEADS,), -1e9)
    for kernel in ("sdpa", "blocked"):
        spec = AttentionSpec(scale=SCALE)
        with_sinks = attend(q, k, v, replace(spec, sinks=off), kernel)
        assert relative_error(with_sinks, attend(q, k, v, spec, kernel)) < 1e-6


def test_scores_written_out_are_what_the_fused_way_computes() -> None:
    """Windows on a GPU in fp32 go this way, where no kernel gives sums under a mask."""
    q, k, v, sinks, _ = (x.detach() for x in leaves(before=40))
    by_head = [x.permute(1, 2, 0, 3) for x in (q, k, v)]
    found = written_out(*by_head, None, SCALE, sinks).permute(2, 0, 1, 3)
    spec = AttentionSpec(scale=SCALE, before=40, sinks=sinks)
    assert relative_error(found, attend(q, k, v, spec, "reference")) < 1e-12


def test_kernels_without_sums_refuse_sinks_and_name_those_that_serve() -> None:
    spec = AttentionSpec(scale=SCALE, sinks=torch.zeros(HEADS))
    for kernel in REGISTRY:
        place = Place(torch.device("cpu"), torch.float32, HEAD_DIM)
        why_not = REGISTRY[kernel].refusal(spec, place)
        able = kernel in ("reference", "sdpa", "blocked")
        assert (why_not is None) == able, why_not
    q, k, v, *_ = leaves()
    with pytest.raises(ConfigError) as refused, torch.no_grad():
        attend(q, k, v, spec, "flex")
    assert str(refused.value) == "kernels=flex has no learned sinks. Use blocked or sdpa."


def test_layers_with_sinks_are_given_kernels_that_serve_them() -> None:
    """On CUDA as well, where the usual kernel of full layers may be one without sums."""
    from megahybrid.config.training import KernelConfig

    schemes = cases.model("sink").layer_plan.expand()
    assert kinds_with_sinks(schemes) == {"full", "windowed"}
    assert kinds_with_sinks(schemes[1:]) == {"full"}
    assert kinds_with_sinks(cases.model("rope").layer_plan.expand()) == set()
    cuda = torch.device("cuda")
    assert "blocked" in candidates("windowed", cuda, torch.float32, 64, sinks=True)
    with pytest.raises(ConfigError) as refused:
        resolve_kernels(KernelConfig(), cuda, torch.float32, 64, sinks={"full"})
    assert str(refused.value) == (
        "kernels=auto: no kernel has documents within a row and learned sinks in float32 on cuda. "
        "Use reference."
    )


def test_the_sinks_gradient_needs_the_output_and_sums_that_have_them_in() -> None:
    q, k, v, sinks, grad = (x.detach() for x in leaves())
    spec = AttentionSpec(scale=SCALE, sinks=sinks)
    out, (sums,) = attention_forward(q, k, v, spec, "sdpa")
    *_, wanted = explicit(*leaves(), _plain())
    assert relative_error(gradient_of_sinks(grad, out, sums, sinks), wanted) < 1e-12
    plain, (without,) = attention_forward(q, k, v, _plain(), "sdpa")
    assert relative_error(gradient_of_sinks(grad, plain, without, sinks), wanted) > 0.1


def sinks_ignored(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, kernel: str) -> Tensor:
    return attend(q, k, v, replace(spec, sinks=None), kernel)


def neighbours_sink(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, kernel: str) -> Tensor:
    sinks = None if spec.sinks is None else spec.sinks.flip(0)
    return attend(q, k, v, replace(spec, sinks=sinks), kernel)


def sums_without_gradient(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, kernel: str
) -> Tensor:
    """The trap, whatever the kernel: what the keys keep of a query gives q and k no gradient."""
    plain = attend(q, k, v, replace(spec, sinks=None), kernel)
    ones = torch.ones_like(v)
    share = attend(q.detach(), k.detach(), ones, spec, kernel)
    return plain * share


def sinks_without_gradient(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, kernel: str
) -> Tensor:
    sinks = None if spec.sinks is None else spec.sinks.detach()
    return attend(q, k, v, replace(spec, sinks=sinks), kernel)


FAULTS = {
    sinks_ignored: "output",
    neighbours_sink: "output",
    sums_without_gradient: "gradient of (queries|keys)",
    sinks_without_gradient: "gradient of sinks.logits",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("number", [0, 1], ids=["window", "full"])
def test_the_self_test_sees_sinks_that_are_wrong(
    number: int, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = cases.model("sink").layer_plan.expand()[number]
    shape = HeadShape(2, 1, 16, torch.float32, torch.device("cpu"))
    monkeypatch.setattr(core_attention, "attend", fault)
    with pytest.raises(AuditError, match=f"computes another {FAULTS[fault]} than it says"):
        run_self_test({"sunk": scheme}, shape, {"sunk": "auto"}, rank=0)
