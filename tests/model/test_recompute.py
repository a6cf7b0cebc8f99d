"""Selective recompute: what is said to be dropped is gone, and the gradients are the same."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megahybrid.model import activation_offload
from megahybrid.model.recompute import rederived, run_block
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.matmul import linear
from megahybrid.parallel.mesh import ParallelMesh
from tests.parity.cases import model
from tests.plain_model import random_tensors


class Sine(torch.autograd.Function):
    """Keeps its input only, so that nothing but a reader keeps its output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize("reader", [F.linear, linear], ids=["torch", "ours"])
def test_a_rederived_tensor_does_not_outlive_its_forward(reader: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(4096, 1, 64, requires_grad=True)
    weight = torch.randn(48, 64, requires_grad=True)
    kept = torch.autograd.grad(reader(Sine.apply(x), weight).square().sum(), (x, weight))

    dropped = Sine.apply(x)
    alive = weakref.ref(dropped)
    with rederived(dropped, torch.sin, x.detach()):
        y = reader(dropped, weight)
    del dropped
    gc.collect()
    assert alive() is None
    for ours, plain in zip(torch.autograd.grad(y.square().sum(), (x, weight)), kept, strict=True):
        assert torch.equal(ours, plain)


def test_only_the_tensor_itself_is_rederived() -> None:
    x = torch.randn(32, 1, 16, requires_grad=True)
    other, weight = torch.randn(32, 1, 16), torch.randn(8, 16, requires_grad=True)
    normed = x.sin()
    with rederived(normed, lambda source: torch.full_like(source, torch.nan), x.detach()):
        y = F.linear(other, weight)
    (grad,) = torch.autograd.grad(y.sum(), weight)
    assert grad.isfinite().all()


@pytest.mark.parametrize("policy", ["selective", "full", "offload"])
@pytest.mark.parametrize("block", ["pre_norm", "parallel"])
def test_every_policy_gives_the_gradients_of_none(policy: str, block: str) -> None:
    config = model("rnope_swa", block)
    tokens = torch.randint(config.vocab_size, (2, 40))
    results = []
    for each in ("none", policy):
        built = Transformer(config, ParallelMesh.single(), recompute=[each] * 2)
        built.load_canonical(random_tensors(config, 0, torch.float32))
        loss, _ = built(tokens, tokens)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in built.parameters())])
    for kept, again in zip(*results, strict=True):
        assert torch.equal(kept, again)


def test_an_offloaded_layer_leaves_nothing_on_the_device_but_its_output() -> None:
    waiting = torch.randn(64, 1, 16, requires_grad=True)
    hidden = waiting * 2
    alive = weakref.ref(hidden)
    out = run_block(lambda x, _: x.sin().cos(), hidden, SimpleNamespace(offloaded=[]), "offload")
    del hidden
    gc.collect()
    assert alive() is None
    out.sum().backward()
    plain = (waiting.detach() * 2).requires_grad_()
    plain.sin().cos().sum().backward()
    assert waiting.grad is not None and plain.grad is not None
    assert torch.equal(waiting.grad, 2 * plain.grad)


def test_while_a_layer_runs_backward_the_input_of_the_one_below_is_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    coming: list[list[int]] = []

    @contextmanager
    def road(device: torch.device) -> Iterator[None]:
        told.append("copy")
        yield

    def layer(name: str) -> Any:
        def run(x: Tensor, _: Any) -> Tensor:
            told.append(name)
            coming.append([n for n, each in enumerate(context.offloaded) if each.arriving])
            return x.sin()

        return run

    monkeypatch.setattr(activation_offload, "copy_stream", road)
    x, context = torch.randn(8, 1, 4, requires_grad=True), SimpleNamespace(offloaded=[])
    hidden = x * 1
    for name in ("first", "second", "third"):
        hidden = run_block(layer(name), hidden, context, "offload")
    assert told == ["copy", "first", "copy", "second", "copy", "third"]
    told.clear()
    coming.clear()
    hidden.sum().backward()
    # The uppermost brings its own and the next one's; the lowest has nothing to send for.
    assert told == ["copy", "copy", "third", "copy", "second", "first"]
    assert coming == [[1], [0], []]
    assert all(each.arriving is None for each in context.offloaded)
    (plain,) = torch.autograd.grad(x.sin().sin().sin().sum(), x)
    assert x.grad is not None and torch.equal(x.grad, plain)


def test_what_waits_in_host_memory_is_a_copy_that_can_come_back_twice() -> None:
    tensor = torch.randn(5, 3)
    kept = tensor.clone()
    waiting = activation_offload.OffloadedTensor(tensor, None)
    tensor.zero_()
    assert torch.equal(waiting.back(), kept)
    waiting.back().zero_()
    assert torch.equal(waiting.back(), kept)


def test_copies_begin_behind_what_was_queued_and_readers_wait_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            told.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event: str) -> None:
            told.append(f"{self.name} waits for {event}")

        def record_event(self) -> str:
            told.append("mark")
            return "the mark"

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        told.append(f"on {stream.name}")
        yield

    main, road = Stream("main"), Stream("road")
    copy_stream, copy = activation_offload.copy_stream, Tensor.copy_
    monkeypatch.setattr(activation_offload, "_one_stream", lambda device: road)
    monkeypatch.setattr(
        activation_offload, "copy_stream", lambda device: copy_stream(torch.device("cuda:0"))
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", on)

    def copied(x: Tensor, y: Tensor, non_blocking: bool) -> Tensor:
        assert non_blocking
        told.append("copy")
        return copy(x, y)

    held: list[Tensor] = []
    monkeypatch.setattr(Tensor, "copy_", copied)
    monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: held.append(x))
    tensor = torch.arange(3.0)
    waiting = activation_offload.OffloadedTensor(tensor, None)
    leaving = ["road waits for main", "on road", "copy"]
    assert told == leaving and held[0] is tensor
    told.clear()
    back = waiting.back()
    assert told == [*leaving, "mark", "main waits for the mark"]
    assert held[1] is back and torch.equal(back, tensor)
