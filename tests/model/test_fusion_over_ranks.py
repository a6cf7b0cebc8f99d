"""Two views of keys over context ranks: keys go once and are rotated where they arrive."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megahybrid.config.attention import AttentionScheme
from megahybrid.config.context import Exchange, Layout
from megahybrid.config.context_plan import SplitPart, parts_of
from megahybrid.config.fusion import Fuse
from megahybrid.config.parallel import ExchangeConfig, ParallelConfig
from megahybrid.config.training import OptimizerConfig
from megahybrid.errors import AuditError
from megahybrid.model import fusion
from megahybrid.model.context import SequenceContext
from megahybrid.model.context_attention import ShardedCall
from megahybrid.model.fusion import FuseGate, TwoViews, fused_output
from megahybrid.model.init import initialise
from megahybrid.model.row_shards import ContextRanks, RowShards
from megahybrid.model.selftest import HeadShape, run_context_test
from megahybrid.model.transformer import Transformer
from tests import distributed
from tests.interop.examples import model_of

NOPE: dict[str, Any] = {"position": {"kind": "nope"}}
NEAR: dict[str, Any] = {"position": {"kind": "rope", "theta": 10000.0}, "window": 5}
FULL = NOPE | {"qk_norm": {"kind": "rms"}}
WINDOWED = {"position": {"kind": "rope", "theta": 500.0}, "window": 21}
Lies = tuple[Layout, Exchange, Exchange]  # the layout, and what full and windowed layers exchange
LIES: list[Lies] = [
    ("contiguous", "heads", "halo"),
    ("zigzag", "keys", "halo"),
    ("contiguous", "keys", "keys"),
    ("zigzag", "heads", "heads"),
]
LENGTH = 48


def fused(far: dict[str, Any], gate: str = "token", initial: float = 0.5) -> dict[str, Any]:
    return far | {"near": NEAR, "fuse": {"gate": gate, "initial": initial}}


def output(
    mesh: Any, scheme: dict[str, Any], lies: Lies, bias: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of rows with documents, and the gradients of all weights but those of shares, on a
    model of two layers with the same first weights whatever its schemes are."""
    layout, full, windowed = lies
    exchange = ExchangeConfig(full=full, windowed=windowed, layout=layout)
    parallel = ParallelConfig(context=mesh.context.size, exchange=exchange)
    config = model_of([scheme, scheme])
    model = Transformer(config, mesh, context=ContextRanks(mesh, config, parallel))
    initialise(model, 5, OptimizerConfig())
    for name, parameter in model.named_parameters():
        if bias is not None and name.endswith("fuse_gate.bias"):
            torch.nn.init.constant_(parameter, bias)
    tokens = torch.randint(61, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    starts = torch.zeros_like(tokens)
    starts[1, 9:] = 9
    starts[1, 25:] = 25
    loss, _ = model(tokens, tokens.roll(-1, 1), starts)
    loss.backward()
    grads = {}
    for parameter, spec in model.sharded_parameters().values():
        assert parameter.grad is not None
        for segment, start, stop in spec.flat_ranges():
            if "fuse_gate" not in segment.name:
                grads[segment.name] = parameter.grad.flatten()[start:stop]
    return model.logits(tokens, starts), grads


def compared(ranks: distributed.Ranks, lies: Lies) -> dict[str, tuple[bool, float]]:
    """Of each gate and share: the logits are those of near or far alone to the bit, and how far its
    gradients are from theirs."""
    mesh, found = ranks.mesh(1, ranks.world_size), {}
    layout, full, windowed = lies
    for kind, far in (("full", FULL), ("windowed", WINDOWED)):
        # The near view by itself, by the exchange of the layer that it is part of.
        by = full if kind == "full" else windowed
        alone = {
            0.0: output(mesh, far, lies),
            1.0: output(mesh, far | NEAR, (layout, full, by)),
        }
        for gate in ("fixed", "head", "token"):
            for share, (logits, grads) in alone.items():
                initial = share if gate == "fixed" else 0.5
                bias = 40.0 if share else -200.0
                ours, mine = output(mesh, fused(far, gate, initial), lies, bias)
                off = max(
                    float((mine[name] - grad).norm() / grad.norm().clamp(min=1e-7))
                    for name, grad in grads.items()
                )
                found[f"{kind} {gate} {share}"] = (torch.equal(ours, logits), off)
        found[f"{kind} between"] = (torch.equal(output(mesh, fused(far), lies)[0], logits), 1.0)
    return found


@pytest.mark.parametrize("lies", LIES, ids=lambda lies: "-".join(lies))
def test_a_share_of_1_or_0_is_the_near_or_the_far_scheme_bit_for_bit(lies: Lies) -> None:
    for found in distributed.run(2, compared, lies):
        assert not found.pop("full between")[0] and not found.pop("windowed between")[0]
        assert len(found) == 12
        assert {name for name, (same, _) in found.items() if not same} == set()
        assert {name: off for name, (_, off) in found.items() if not off < 1e-4} == {}


SCHEMES = {
    "token": WINDOWED | {"near": NEAR, "fuse": {"gate": "token"}, "qk_norm": {"kind": "rms"}},
    "head": NOPE
    | {"near": NEAR | {"window": 300}, "fuse": {"gate": "head"}, "score_scale": {"kind": "ssmax"}},
    "fixed": NOPE
    | {"near": NEAR | {"window": None}, "fuse": {"gate": "fixed", "initial": 0.3}, "gate": "head"},
    "split": NOPE | {"near": NEAR, "split": {"near": 1, "of": 2}},
}


def self_tested(
    mesh: Any, name: str, lies: Lies, dtype: torch.dtype = torch.float32
) -> list[tuple[str, str, float]]:
    scheme, (layout, full, windowed) = AttentionScheme.model_validate(SCHEMES[name]), lies
    by_part = {}
    for part in parts_of(scheme):
        window = part.window if isinstance(part, SplitPart) else part
        by_part[part] = full if window is None else windowed
    shards = RowShards(mesh.context, layout, 0, tuple(by_part.items()))
    shape = HeadShape(4, 4, 16, dtype, torch.device("cpu"))
    return run_context_test({name: scheme}, shape, {name: "auto"}, shards, mesh.world)


PASSES = {
    "token": (LIES[0], torch.bfloat16),
    "head": (LIES[1], torch.float32),
    "fixed": (LIES[3], torch.bfloat16),
    "split": (LIES[0], torch.float32),
}


def all_self_tested(ranks: distributed.Ranks) -> list[str]:
    mesh = ranks.mesh(1, ranks.world_size)
    return [line[1] for name, how in PASSES.items() for line in self_tested(mesh, name, *how)]


def test_the_self_test_passes_both_views_over_ranks() -> None:
    found, _ = distributed.run(2, all_self_tested, timeout_seconds=300)
    assert found == ["halo", "keys", "heads", "halo and heads"]


def local_positions(patch: pytest.MonkeyPatch) -> None:
    """Received keys are rotated from where the shard begins."""
    right = SequenceContext.rotary_table

    def table(self: Any, rope: Any, head_dim: int, stretch: Any = None) -> Any:
        if stretch is not None:
            stretch = (0, stretch[1] - stretch[0])
        return right(self, rope, head_dim, stretch)

    patch.setattr(SequenceContext, "rotary_table", table)


def not_rotated_back(patch: pytest.MonkeyPatch) -> None:
    """Gradients of rotated keys go to their owner as they are."""
    patch.setattr(ShardedCall, "rotated_back", lambda self, grad, first, last: grad)


def of_far(patch: pytest.MonkeyPatch) -> None:
    """Near sees what far does."""
    right = TwoViews._call

    def call(self: TwoViews, view: Any, context: Any, batch: int) -> ShardedCall:
        found = right(self, view, context, batch)
        return replace(found, whole=replace(found.whole, window=self.scheme.window))

    patch.setattr(TwoViews, "_call", call)


def gates_of_the_first(patch: pytest.MonkeyPatch) -> None:
    """Each rank has the biases of the first heads."""
    right = FuseGate.forward
    patch.setattr(
        FuseGate,
        "forward",
        lambda self, like, product, heads=slice(None): right(
            self, like, product, slice(0, like.shape[2])
        ),
    )


def swapped(patch: pytest.MonkeyPatch) -> None:
    """The share is that of far."""
    patch.setattr(fusion, "fused_output", lambda near, far, share: fused_output(far, near, share))


FAULTS: dict[str, tuple[str, Lies, Callable[[pytest.MonkeyPatch], None]]] = {
    "local-positions-halo": ("token", LIES[0], local_positions),
    "local-positions-keys": ("head", LIES[1], local_positions),
    "not-rotated-back": ("head", LIES[2], not_rotated_back),
    "near-as-far": ("token", LIES[0], of_far),
    "near-as-far-keys": ("head", LIES[2], of_far),
    "gates-of-the-first": ("head", LIES[0], gates_of_the_first),
    "swapped": ("fixed", LIES[3], swapped),
}


def said(ranks: distributed.Ranks) -> dict[str, str]:
    mesh, found = ranks.mesh(1, ranks.world_size), {}
    for fault, (name, lies, plant) in FAULTS.items():
        with pytest.MonkeyPatch.context() as patch:
            plant(patch)
            try:
                self_tested(mesh, name, lies)
                found[fault] = ""
            except AuditError as error:
                found[fault] = str(error)
    return found


def test_the_self_test_finds_every_fault_of_two_views_over_ranks() -> None:
    first, second = distributed.run(2, said, timeout_seconds=300)
    assert first == second
    assert [fault for fault, words in first.items() if not words] == []
    for fault, (name, _, _) in FAULTS.items():
        assert first[fault].startswith(f"self-test: scheme '{name}' with exchange ")


def test_a_fixed_share_is_asked_for_with_all_of_one_view() -> None:
    """What the self-test asks of each view goes through the exchange of both."""
    from megahybrid.model.selftest.across_ranks import sides

    scheme = AttentionScheme.model_validate(SCHEMES["token"])
    near, far = sides(scheme, "blocked+sdpa")
    assert [side[0].fuse for side in (near, far)] == [
        Fuse(gate="fixed", initial=1.0),
        Fuse(gate="fixed", initial=0.0),
    ]
    assert (near[1].reach, far[1].reach) == (5, 21)
