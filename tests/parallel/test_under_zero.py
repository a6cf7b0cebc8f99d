"""The layers under DeepSpeed's ZeRO 1, 2 and 3 train like one plain process.

ZeRO-3 has a parameter whole only while its own module runs, so this is where saved views,
parameters in lists and weights read by another module would show.
"""

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megahybrid.parallel.collectives import copy_to_tensor
from megahybrid.parallel.linear import (
    ColumnParallelLinear,
    Output,
    RowParallelLinear,
    sharded_parameter,
)
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.parallel.mpu import Mpu
from megahybrid.parallel.sharding import Segment, ShardSpec, shard_spec
from megahybrid.parallel.vocab import VocabParallelEmbedding, VocabParallelHead
from tests.distributed import Ranks, run
from tests.parallel.compare import draw, error, load

VOCAB, HIDDEN, SEQ, ROWS, STEPS = 50, 16, 8, 4, 4
SHAPES = {
    "embedding.weight": (VOCAB, HIDDEN),
    "norm.weight": (HIDDEN,),
    "up.weight": (32, HIDDEN),
    "gate.weight": (8, HIDDEN),
    "down.weight": (HIDDEN, 32),
}


class Norm(nn.Module):
    def __init__(self, mesh: ParallelMesh) -> None:
        super().__init__()
        self.axis = mesh.tensor
        self.weight = sharded_parameter((Segment("norm.weight", (HIDDEN,), None),), mesh)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (HIDDEN,)) * copy_to_tensor(self.weight, self.axis)


class Model(nn.Module):
    """Every kind of layer once: tied vocabulary, norm, fused and replicated outputs, row layer."""

    def __init__(self, mesh: ParallelMesh, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        head = mesh.tensor.rank * 2 // mesh.tensor.size  # two heads of 4 rows for all ranks
        gate = Output("gate.weight", 8, sharded=False, keep=(4 * head, 4 * head + 4))
        self.embedding = VocabParallelEmbedding(VOCAB, HIDDEN, "embedding.weight", mesh)
        self.norm = Norm(mesh)
        self.column = ColumnParallelLinear(HIDDEN, (Output("up.weight", 32), gate), mesh)
        self.row = RowParallelLinear(32, HIDDEN, "down.weight", mesh)
        self.head = VocabParallelHead.tied(self.embedding, mesh)

    def block(self, x: Tensor) -> Tensor:
        up, gate = self.column(self.norm(x))
        return x + self.row(torch.tanh(up) * gate.sum(-1, keepdim=True))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x)
        return self.head(x, targets, 0.5)[0]


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (ROWS, SEQ + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, :5] = -100  # uneven over the data ranks
    return tokens[:, :-1], targets


def start_values() -> dict[str, Tensor]:
    return {name: draw(name, *shape, dtype=torch.float32) / 3 for name, shape in SHAPES.items()}


def train_plain(tensor: int) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and final weights of one process without any of the parallel code."""
    weights = {name: nn.Parameter(value.clone()) for name, value in start_values().items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2, eps=1e-5, weight_decay=0.1)
    losses = []
    for step in range(STEPS):
        tokens, targets = batch(step)
        x = F.embedding(tokens, weights["embedding.weight"])
        y = F.rms_norm(x, (HIDDEN,)) * weights["norm.weight"]
        up = torch.tanh(y @ weights["up.weight"].t())
        heads = (y @ weights["gate.weight"].t()).unflatten(-1, (2, 4)).sum(-1)
        if tensor == 1:
            gates = heads[..., :1].expand_as(up)
        else:
            gates = heads.repeat_interleave(16, dim=-1)
        x = x + (up * gates) @ weights["down.weight"].t()
        logits = x @ weights["embedding.weight"].t() * 0.5
        loss = F.cross_entropy(logits.permute(0, 2, 1), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(weights.values(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: weight.detach() for name, weight in weights.items()}


def train_under_zero(ranks: Ranks, tensor: int, stage: int, recompute: bool) -> Any:
    """Errors of losses and of final weights against the plain process."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(ranks.rank))
    import deepspeed
    from deepspeed.ops import __compatible_ops__
    from deepspeed.utils import safe_get_full_fp32_param

    __compatible_ops__["deepspeed_shm_comm"] = False  # else a compiler runs under a file lock
    mesh = ranks.mesh(tensor)
    model = Model(mesh, recompute)
    load(model, start_values())
    config = {
        "train_micro_batch_size_per_gpu": ROWS // mesh.data.size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-5, weight_decay=0.1)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, mpu=Mpu(mesh), dist_init_required=False
    )
    losses, weights = train_plain(tensor)
    errors = {}
    for step in range(STEPS):
        tokens, targets = (part.chunk(mesh.data.size)[mesh.data.rank] for part in batch(step))
        counted = int((batch(step)[1] != -100).sum())
        loss = engine(tokens, targets)
        engine.backward(loss * mesh.data.size / counted)
        engine.step()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total, group=engine.mpu.get_data_parallel_group())
        errors[f"loss{step}"] = abs(total.item() / counted / losses[step] - 1)
    for name, parameter in model.named_parameters():
        spec = shard_spec(parameter)
        errors[name] = error(safe_get_full_fp32_param(parameter), spec.split(weights))
        assert isinstance(spec, ShardSpec) and parameter.tensor_model_parallel == spec.sharded
    engine.destroy()
    return errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensor", "zero_stage", "recompute"),
    [(2, 1, False), (4, 1, True), (2, 2, False), (1, 3, False), (2, 3, False), (4, 3, True)],
)
def test_layers_under_zero_train_like_one_process(
    tensor: int, zero_stage: int, recompute: bool
) -> None:
    for errors in run(4, train_under_zero, tensor, zero_stage, recompute, timeout_seconds=200):
        assert max(errors.values()) < 1e-5, errors
