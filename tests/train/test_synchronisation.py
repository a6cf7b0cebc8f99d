"""The host waits for the device once a step, when all of its work is queued."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megahybrid.config.parsing import parse
from megahybrid.config.run import RunConfig
from megahybrid.model.kernels.documents import Documents
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.train.engine import Engine, MicroBatch
from tests import distributed
from tests.parity.cases import model
from tests.plain_model import random_tensors

# What makes a host wait for a device's tensor, as Python spells it.
READERS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
SHAPES_FROM_VALUES = ("nonzero", "masked_select", "unique", "_local_scalar_dense")
ROWS, LENGTH = 2, 700


class _Dispatched(TorchDispatchMode):
    """Operators that read a value, also where no Python method names them."""

    def __init__(self, counts: Counter[str], inside: list[bool]) -> None:
        super().__init__()
        self.counts, self.inside = counts, inside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if any(word in name for word in SHAPES_FROM_VALUES) and not self.inside[0]:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def reads() -> Iterator[Counter[str]]:
    """Counts every reading of a tensor's values. Each is counted once, by its outermost name."""
    counts: Counter[str] = Counter()
    inside = [False]

    def watch(name: str) -> Any:
        real = getattr(Tensor, name)

        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if inside[0]:
                return real(self, *args, **kwargs)
            counts[name] += 1
            inside[0] = True
            try:
                return real(self, *args, **kwargs)
            finally:
                inside[0] = False

        return call

    with ExitStack() as stack:
        for name in READERS:
            stack.enter_context(mock.patch.object(Tensor, name, watch(name)))
        stack.enter_context(_Dispatched(counts, inside))
        yield counts


def run_config(config: Any, precision: str, zero_stage: int) -> RunConfig:
    tokens = ROWS * LENGTH
    return parse(
        RunConfig,
        {
            "model": config.model_dump(),
            "parallel": {"zero_stage": zero_stage},
            "data": {"sources": {"text": {"path": "unused"}}, "block_tokens": LENGTH},
            "precision": precision,
            "device": "cpu",
            "stages": [
                {
                    "name": "only",
                    "tokens": tokens,
                    "lengths": {LENGTH: 1},
                    "batch_tokens": tokens,
                    "micro_batch_tokens": tokens,
                    "weights": {"text": 1},
                    "learning_rate": {"kind": "linear", "start": 1e-3, "end": 1e-3},
                }
            ],
        },
    )


def counted_steps(ranks: distributed.Ranks, precision: str, zero_stage: int) -> Any:
    """Reads of a later step: before the update, in DeepSpeed's own update, and behind it. And how
    often DeepSpeed waited for its accelerator in all of them."""
    config = model("ssmax")
    mesh = ranks.mesh(1)
    built = Transformer(config, mesh)
    built.load_canonical(random_tensors(config, 0, torch.float32))
    os.environ["LOCAL_RANK"] = "5"  # the launcher's word, whatever DeepSpeed wants to read there
    engine = Engine(built, run_config(config, precision, zero_stage), mesh)
    tokens = torch.randint(config.vocab_size, (ROWS, LENGTH))
    starts = Documents.from_lengths([[100, 600], [300, 400]]).starts
    before_update: Counter[str] = Counter()
    theirs: Counter[str] = Counter()
    update = engine.deepspeed.step

    from deepspeed.accelerator import get_accelerator

    accelerator = type(get_accelerator())
    waits = mock.Mock(return_value=None)
    with reads() as counts, mock.patch.object(accelerator, "synchronize", waits):

        def step() -> None:
            before_update.update(counts)
            update()
            theirs.update(counts - before_update)

        for _ in range(4):  # DeepSpeed's timer of throughput would wait from the third on
            # Spans are found on the host's own tensor, before the model sees it.
            batch = MicroBatch(tokens, tokens, starts)
            for each in (counts, before_update, theirs):
                each.clear()
            with (
                mock.patch.object(engine.deepspeed, "step", step),
                mock.patch.object(Documents, "spans", spans_uncounted(counts)),
            ):
                engine.train_step([batch, batch], 1e-3)
        ours = counts - before_update - theirs
    engine.close()
    assert os.environ.pop("LOCAL_RANK") == "5"
    return dict(before_update), dict(theirs), dict(ours), waits.call_count


def spans_uncounted(counts: Counter[str]) -> Any:
    """`Documents.spans`, whose reads are of the host's own memory."""
    real = Documents.spans

    def spans(self: Documents) -> Any:
        kept = Counter(counts)
        found = real(self)
        counts.clear()
        counts.update(kept)
        return found

    return spans


@pytest.mark.parametrize("precision,zero_stage", [("fp32", 1), ("bf16", 1), ("bf16", 2)])
def test_a_step_is_read_once_when_it_is_done(precision: str, zero_stage: int) -> None:
    ((before, theirs, ours, waits),) = distributed.run(1, counted_steps, precision, zero_stage)
    assert waits == 0  # nor for the device itself
    assert before == {}  # forward and backward of all micro-batches are queued without a look
    assert ours == {"tolist": 1}  # loss, count and norms together
    # DeepSpeed looks whether the gradient is finite, and at its norm.
    assert sum(theirs.values()) <= 8, theirs


def test_a_value_that_is_read_is_seen() -> None:
    with reads() as counts:
        x = torch.ones(3)
        if x.sum() > 1:
            x.nonzero()
        float(x[0])
    assert counts["__bool__"] == 1 and counts["nonzero"] == 1 and counts["__float__"] == 1


@pytest.mark.gpu
def test_a_device_never_waits_inside_a_forward_and_backward() -> None:
    config, device = model("rnope_swa"), torch.device("cuda:0")
    built = Transformer(config, ParallelMesh.single(device)).bfloat16()
    tokens = torch.randint(config.vocab_size, (ROWS, LENGTH), device=device)
    starts = Documents.from_lengths([[100, 600], [300, 400]]).starts
    for mode in ("default", "error"):  # the first makes what every batch shares
        torch.cuda.set_sync_debug_mode(mode)
        try:
            built(tokens, tokens, starts)[0].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
