"""Moments that wait in host memory change where they are and nothing else."""

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megahybrid.config.chunk_sizes import OFFLOAD_PIECE, OFFLOAD_ROOMS
from megahybrid.config.memory_estimate import memory_per_rank
from megahybrid.config.parsing import parse
from megahybrid.config.run import RunConfig
from megahybrid.train.engine.offload import locked_zeros
from tests import distributed
from tests.config.example import example
from tests.parity.cases import model

SEQ = 16
# (tensor ranks, ZeRO stage, precision), on two ranks
LAYOUTS = [(1, 0, "fp32"), (1, 1, "bf16"), (1, 2, "fp32"), (1, 3, "bf16"), (2, 1, "bf16")]


def run_config(tensor: int, zero_stage: int, precision: str, offload: str) -> RunConfig:
    stage = {
        "name": "only",
        "tokens": 2 * SEQ,
        "lengths": {SEQ: 1},
        "batch_tokens": 2 * SEQ,
        "micro_batch_tokens": SEQ,
        "weights": {"text": 1},
        "learning_rate": {"kind": "linear", "start": 1e-3, "end": 1e-3},
    }
    return parse(
        RunConfig,
        {
            "model": model("layernorm-per_head").model_dump(),
            "parallel": {"tensor": tensor, "zero_stage": zero_stage, "offload": offload},
            "data": {"sources": {"text": {"path": "unused"}}, "block_tokens": 1024},
            "precision": precision,
            "device": "cpu",
            "stages": [stage],
        },
    )


def trained(ranks: distributed.Ranks, *layout: Any) -> list[tuple[list[Any], list[Any]]]:
    """Losses of three steps, and all states after the second and the third, without and with
    off-loading."""
    from megahybrid.model.init import initialise
    from megahybrid.model.transformer import Transformer
    from megahybrid.train.engine import Engine, MicroBatch
    from megahybrid.train.engine.offload import OffloadedAdamW

    tensor, zero_stage, precision = layout
    mesh = ranks.mesh(tensor)

    def engine(offload: str) -> Engine:
        run = run_config(tensor, zero_stage, precision, offload)
        built = Transformer(run.model, mesh)
        initialise(built, run.seed, run.optimizer)
        return Engine(built, run, mesh)

    def states(made: Engine) -> list[Any]:
        return [(f.tensor, f.state, f.box, f.flat, np.array(f.data)) for f in made.fragments()]

    def step(made: Engine, number: int) -> float:
        generator = torch.Generator().manual_seed(10 * number + mesh.data.rank)
        tokens = torch.randint(made.model.config.vocab_size, (2, SEQ), generator=generator)
        batches = [MicroBatch(row[None], row[None], None) for row in tokens]
        return made.train_step(batches, 1e-3).loss

    told = []
    # Pieces that no partition is a multiple of.
    with mock.patch.object(OffloadedAdamW, "piece", 192):
        for offload in ("none", "moments"):
            made = engine(offload)
            losses = [step(made, number) for number in range(2)]
            assert isinstance(made.optimizer, OffloadedAdamW) == (offload == "moments")
            half = states(made)
            losses.append(step(made, 2))
            told.append((losses, half + states(made)))
            made.close()
    return told


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_bit_is_that_of_a_run_without(layout: tuple[int, int, str]) -> None:
    for plain, offloaded in distributed.run(2, trained, *layout):
        assert plain[0] == offloaded[0]
        for mine, other in zip(plain[1], offloaded[1], strict=True):
            assert mine[:4] == other[:4]
            assert np.array_equal(mine[4].view(np.uint32), other[4].view(np.uint32)), mine[:4]


def test_host_memory_is_locked_as_it_is_long_until_its_last_tensor_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = mock.Mock()
    device.cudaHostRegister.return_value = 0
    monkeypatch.setattr(torch.cuda, "cudart", lambda: device)
    zeros = locked_zeros(torch.Size([3, 335]), torch.float32)
    assert zeros.shape == (3, 335) and not zeros.any()
    address = zeros.data_ptr()
    assert device.cudaHostRegister.call_args.args == (address, 4020, 0)
    part = zeros.view(-1)[7:].fill_(1)
    del zeros
    assert part.sum() == 998 and not device.cudaHostUnregister.called
    del part
    assert device.cudaHostUnregister.call_args.args == (address,)


def test_moments_are_not_counted_among_the_memory_of_a_device() -> None:
    run = parse(RunConfig, example())
    where: dict[str, Any] = {"tensor": 1, "data_degree": 1, "precision": "bf16"}
    stage = run.stages[0]
    for zero_stage in (1, 3):
        here, there = (
            memory_per_rank(run.model, stage, zero_stage=zero_stage, offload=offload, **where)
            for offload in ("none", "moments")
        )
        count = here.optimizer // 12
        rooms = 8 * OFFLOAD_ROOMS * min(OFFLOAD_PIECE, count)
        assert there.optimizer == 4 * count + rooms
        assert (there.weights, there.gradients) == (here.weights, here.gradients)
