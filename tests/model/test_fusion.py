"""Layers with two views of the same keys: g = 1 and g = 0 are the near and the far scheme."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megahybrid.checkpoint.fingerprint import model_fingerprint
from megahybrid.config import parse
from megahybrid.config.attention import AttentionScheme
from megahybrid.config.check import problems
from megahybrid.config.counting import kv_cache_bytes, parameters, training_flops
from megahybrid.config.fusion import HeadSplit
from megahybrid.config.model import ModelConfig
from megahybrid.config.training import OptimizerConfig
from megahybrid.errors import AuditError, ConfigError
from megahybrid.evaluate.generation import Decoder
from megahybrid.model import fusion
from megahybrid.model.attention import Attention
from megahybrid.model.context import SequenceContext
from megahybrid.model.fusion import NearView, TwoViews, _Stretch, fused_output
from megahybrid.model.init import initialise, parameter_rule
from megahybrid.model.kernels import AttentionSpec
from megahybrid.model.selftest import HeadShape, run_self_test
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh
from tests.config.example import example
from tests.interop.examples import model_of

NOPE: dict[str, Any] = {"position": {"kind": "nope"}}
NEAR: dict[str, Any] = {"position": {"kind": "rope", "theta": 10000.0}, "window": 5}
FAR = NOPE | {"qk_norm": {"kind": "rms"}}
LENGTH = 37


def fused(gate: str = "token", initial: float = 0.5, **fields: Any) -> dict[str, Any]:
    return FAR | {"near": NEAR, "fuse": {"gate": gate, "initial": initial}} | fields


def built(*schemes: dict[str, Any], kernel: str = "auto") -> Transformer:
    """A model of float32 with the same first weights whatever its schemes are."""
    config = model_of(schemes)
    model = Transformer(config, ParallelMesh.single(), kernels=[kernel] * len(schemes))
    initialise(model, 5, OptimizerConfig())
    return model


def run(model: Transformer) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of rows with documents, and the gradients of all weights but those of shares."""
    tokens = torch.randint(61, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    starts = torch.zeros_like(tokens)
    starts[1, 9:] = 9
    loss, _ = model(tokens, tokens.roll(-1, 1), starts)
    loss.backward()
    grads = {}
    for name, (parameter, spec) in model.sharded_parameters().items():
        assert parameter.grad is not None, name
        for segment, start, stop in spec.flat_ranges():
            if "fuse_gate" not in segment.name:
                grads[segment.name] = parameter.grad.flatten()[start:stop]
    return model.logits(tokens, starts), grads


def set_shares(model: Transformer, bias: float) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("fuse_gate.bias"):
            torch.nn.init.constant_(parameter, bias)


@pytest.mark.parametrize("kernel", ["auto", "reference", "blocked+sdpa"])
@pytest.mark.parametrize("gate", ["fixed", "head", "token"])
def test_a_share_of_1_or_0_is_the_near_or_the_far_scheme_bit_for_bit(
    gate: str, kernel: str
) -> None:
    near_kernel, _, far_kernel = kernel.partition("+")
    plain = {1.0: FAR | NEAR, 0.0: FAR}
    for share, scheme in plain.items():
        alone = run(built(scheme, kernel=near_kernel if share else far_kernel or near_kernel))
        initial = share if gate == "fixed" else 0.5
        model = built(fused(gate, initial), kernel=kernel)
        set_shares(model, 40.0 if share else -200.0)
        logits, grads = run(model)
        assert torch.equal(logits, alone[0])
        assert grads.keys() == alone[1].keys()
        # A gradient to which the other view adds zeros is laid out otherwise, and summed so.
        for name, grad in alone[1].items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-7, msg=name)


def test_a_bias_of_minus_40_is_the_far_scheme_to_the_bit_in_fp32() -> None:
    model = built(fused())
    set_shares(model, -40.0)
    assert torch.equal(run(model)[0], run(built(FAR))[0])


def test_a_first_share_of_a_half_is_the_mean_of_both_outputs() -> None:
    """The negative control: neither scheme, and every weight of a share has a gradient."""
    model = built(fused())
    logits, _ = run(model)
    assert not torch.equal(logits, run(built(FAR))[0])
    assert not torch.equal(logits, run(built(FAR | NEAR))[0])
    views = model.blocks[0].attention
    assert isinstance(views, TwoViews) and views.fuse_gate is not None
    bias = views.fuse_gate.bias
    assert bias is not None and bias.grad is not None and (bias.grad != 0).all()


def test_the_fused_output_has_the_gradients_of_its_formula() -> None:
    draw = torch.Generator().manual_seed(2)
    near, far = (torch.randn(3, 2, 4, 5, generator=draw).double() for _ in range(2))
    for shape in ((3, 2, 4, 1), (4, 1), (1, 1)):
        share = torch.rand(shape, generator=draw).double()
        leaves = [x.clone().requires_grad_() for x in (near, far, share)]
        assert torch.autograd.gradcheck(fused_output, leaves)


def test_the_share_is_computed_in_fp32_for_bf16_heads() -> None:
    near, far = torch.ones(1, 1, 1, 2).bfloat16(), torch.zeros(1, 1, 1, 2).bfloat16()
    share = torch.full((1, 1), 1 - 2.0**-12)
    out = fused_output(near * 256, far + 1, share)
    assert out.dtype == torch.bfloat16 and out[0, 0, 0, 0] == 256
    exact = fused_output(near * 4096, -near * 4096, torch.full((1, 1), 0.5 + 2.0**-12))
    assert exact[0, 0, 0, 0] == 2  # half a share in bf16 would make it 0


def test_heads_that_are_split_are_those_of_the_two_schemes() -> None:
    """Key heads 0 and 2 of 4, and the two queries that share each."""
    split = FAR | {"near": NEAR, "split": {"near": 1, "of": 2}}
    both = {"near": FAR | NEAR, "far": FAR, "split": split}
    sizes = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 4}
    out = {}
    for name, scheme in both.items():
        model = Transformer(model_of([scheme], **sizes), ParallelMesh.single())
        initialise(model, 5, OptimizerConfig())
        block, seen = model.blocks[0], []
        block.attention.register_forward_hook(lambda *hook, seen=seen: seen.append(hook[-1]))
        model.logits(torch.arange(LENGTH)[None])
        out[name] = seen[0]
    near = torch.tensor([head // 2 % 2 == 0 for head in range(8)])[:, None]
    assert torch.equal(out["split"], torch.where(near, out["near"], out["far"]))


def test_first_values_and_decay_of_the_share() -> None:
    config = model_of([fused("token", 0.3), fused("head", 0.9)])
    optimizer = OptimizerConfig()
    bias = parameter_rule("blocks.0.attention.fuse_gate.bias", config, optimizer)
    assert torch.tensor(bias.constant).sigmoid() == pytest.approx(0.3)
    assert (bias.std, bias.weight_decay, bias.kind) == (None, 0.0, "attention")
    assert parameter_rule("blocks.0.attention.fuse_gate.weight", config, optimizer).std == 0.0
    model = Transformer(config, ParallelMesh.single())
    initialise(model, 5, optimizer)
    for parameter, spec in model.sharded_parameters().values():
        for segment, start, stop in spec.flat_ranges():
            if segment.name.endswith("fuse_gate.weight"):
                assert (parameter.flatten()[start:stop] == 0).all()


def test_parameters_flops_and_cache_are_as_the_equations_say() -> None:
    plain, token, head = (model_of([s]) for s in (FAR, fused(), fused("head")))
    assert parameters(token) - parameters(plain) == 4 * (32 + 1)
    assert parameters(head) - parameters(plain) == 4
    length = 100
    pairs = 5 * length - 10  # of a window of 5
    per_pair = 12 * 4 * 8
    extra = training_flops(head, [length]) - training_flops(plain, [length])
    assert extra == per_pair * pairs
    for model in (token, head):
        assert kv_cache_bytes(model, length) == kv_cache_bytes(plain, length)
    decoder = Decoder(Transformer(token, ParallelMesh.single()), [[1] * 40], 10)
    assert decoder.cache.bytes == kv_cache_bytes(plain, 50, bytes_per_value=4)


def test_a_learned_share_makes_another_model_and_what_a_stage_may_change_does_not() -> None:
    def print_of(**scheme: Any) -> str:
        return model_fingerprint(model_of([FAR | scheme]))

    near = {"near": NEAR}
    wider = {"near": NEAR | {"window": 9}}
    token = print_of(**near, fuse={"gate": "token"})
    assert token == print_of(**wider, fuse={"gate": "token", "initial": 0.1})
    fixed = print_of(**near, fuse={"gate": "fixed"})
    assert fixed == print_of() == print_of(**near, split={"near": 1, "of": 2})
    assert len({token, fixed, print_of(**near, fuse={"gate": "head"})}) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fuse": None}, "near has neither fuse nor split. Give one: fuse for both views in every "
         "head, split for heads of one view or the other."),
        ({"split": {"near": 1, "of": 2}}, "near has fuse and split. Give one: fuse for both views "
         "in every head, split for heads of one view or the other."),
        ({"near": None}, "fuse has no second view (near is null). Give near, or leave it out."),
        ({"window": 4}, "near.window=5 is wider than the far view (window=4). Use 4 or less, or "
         "window: null."),
        ({"window": 4, "near": {"window": None}}, "near.window=null is wider than the far view "
         "(window=4). Use 4 or less, or window: null."),
        ({"chunk": 8}, "near does not go with chunk=8. Use window for the far view."),
        ({"sink": True}, "near does not go with sink: true. Leave one out."),
        ({"near": {"score_scale": {"kind": "ssmax"}}}, "near.score_scale.kind=ssmax is learned, "
         "and a layer learns one scale, the far view's. Use another for near."),
        ({"fuse": {"initial": 1}}, "fuse.initial=1 is no share that a learned gate=token can have. "
         "Use one between 0 and 1, or gate: fixed."),
        ({"fuse": {"gate": "fixed"}}, " changes which parameters exist (qk_norm over head, weight "
         "shared and fuse per token to qk_norm over head, weight shared). Keep qk_norm, ssmax, "
         "gate, bias, sink and fuse as the model has them."),
    ],
)  # fmt: skip
def test_what_two_views_cannot_be_is_refused_in_one_line(
    fields: dict[str, Any], message: str
) -> None:
    scheme = parse(AttentionScheme, fused(), where="scheme")
    with pytest.raises(ConfigError) as raised:
        scheme.with_overrides(fields, where="stage")
    assert str(raised.value) == (f"stage{message}" if message[0] == " " else f"stage.{message}")


def test_a_split_that_leaves_one_view_no_head_is_refused_by_check() -> None:
    run = example("parallel.tensor=1")
    scheme = parse(
        AttentionScheme, FAR | {"near": NEAR, "split": {"near": 2, "of": 3}}, where="scheme"
    )
    plan = run.model.layer_plan
    name = next(iter(plan.schemes))
    schemes = plan.schemes | {name: scheme}
    update = {"layer_plan": plan.model_copy(update={"schemes": schemes}), "num_kv_heads": 2}
    model: ModelConfig = run.model.model_copy(update=update)
    assert problems(run.model_copy(update={"model": model}), 1) == [
        f"model.layer_plan.schemes.{name}.split.near=2 of 3 leaves the far view no key head "
        "(model.num_kv_heads=2). Use fewer than 2 near ones."
    ]


def swapped(near: Tensor, far: Tensor, share: Tensor) -> Tensor:
    return fused_output(far, near, share)


def without_gradient(near: Tensor, far: Tensor, share: Tensor) -> Tensor:
    return fused_output(near, far, share.detach())


def one_key_more(view: NearView, context: SequenceContext, batch: int) -> AttentionSpec:
    return replace(Attention.spec(view, context, batch), window=8)


def of_other_heads(layer: TwoViews, split: HeadSplit) -> list[_Stretch]:
    return [_Stretch(False, 0, 1), _Stretch(True, 1, 2)]


@pytest.mark.parametrize(
    ("owner", "name", "fault", "message"),
    [
        (fusion, "fused_output", swapped, "another output than"),
        (fusion, "fused_output", without_gradient, "another gradient of fuse_gate than"),
        (NearView, "spec", one_key_more, "another output than"),
        (TwoViews, "_stretches", of_other_heads, "another output than"),
    ],
)
def test_the_self_test_finds_a_view_that_is_wrong(
    owner: Any, name: str, fault: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = (
        {"split": {"near": 1, "of": 2}} if name == "_stretches" else {"fuse": {"gate": "token"}}
    )
    near = {"position": NEAR["position"], "window": 7}
    scheme = parse(AttentionScheme, NOPE | {"window": 9, "near": near} | joined, where="scheme")
    shape = HeadShape(4, 2, 8, torch.float32, torch.device("cpu"))
    run_self_test({"layer": scheme}, shape, {"layer": "auto"}, rank=0)
    monkeypatch.setattr(owner, name, fault)
    with pytest.raises(AuditError, match=message):
        run_self_test({"layer": scheme}, shape, {"layer": "auto"}, rank=0)
