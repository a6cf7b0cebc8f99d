"""Column and row parallel layers are nn.Linear at every degree, gradients included."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from megahybrid.parallel.collectives import gather_sequence, local_slice, scatter_sequence
from megahybrid.parallel.linear import ColumnParallelLinear, Output, RowParallelLinear
from megahybrid.parallel.mesh import Axis, ParallelMesh
from tests.distributed import Ranks, run
from tests.parallel.compare import EXACT, draw, error, gradient_errors, load

SEQ, BATCH, IN = 8, 3, 12
LAYOUTS = [(1, 1), (2, 2), (2, 1), (4, 4), (4, 2)]  # (processes, tensor)
IDS = [f"processes{processes}-tensor{tensor}" for processes, tensor in LAYOUTS]
layouts = pytest.mark.parametrize(("processes", "tensor"), LAYOUTS, ids=IDS)


def outputs_with_few_kv_heads(axis: Axis) -> tuple[Output, ...]:
    """Two KV heads of 3 rows. With 4 tensor ranks each is used by two of them, held by all."""
    few = axis.size > 2
    head = axis.rank * 2 // axis.size
    keep = (3 * head, 3 * head + 3) if few else None
    return (
        Output("query.weight", 16),
        Output("key.weight", 6, sharded=not few, keep=keep),
        Output("value.weight", 6, sharded=not few, keep=keep),
        Output("gate.weight", 8),
    )


def local_rows(output: Output, axis: Axis) -> slice:
    """Rows of the canonical weight that this rank computes with."""
    if not output.sharded:
        return slice(*output.kept)
    local = output.features // axis.size
    return slice(axis.rank * local, (axis.rank + 1) * local)


def plain_column(mesh: ParallelMesh, dtype: torch.dtype) -> tuple[Any, ...]:
    """Input, weights and, per tensor rank, the outputs of plain F.linear with their gradients."""
    x = draw("x", SEQ, BATCH, IN, dtype=dtype).requires_grad_()
    weights, total, per_rank = {}, torch.zeros((), dtype=dtype), []
    for rank in range(mesh.tensor.size):
        axis = Axis("tensor", mesh.tensor.size, rank, None, mesh.tensor.ranks)
        ys = []
        for output in outputs_with_few_kv_heads(axis):
            if output.name not in weights:
                weights[output.name] = draw(
                    output.name, output.features, IN, dtype=dtype
                ).requires_grad_()
            y = F.linear(x, weights[output.name][local_rows(output, axis)])
            total = total + (y * draw(f"{output.name}{rank}", *y.shape, dtype=dtype)).sum()
            ys.append(y.detach())
        per_rank.append(ys)
    total.backward()
    full = {name: weight.detach() for name, weight in weights.items()}
    grads = {name: weight.grad for name, weight in weights.items()}
    return x.detach(), full, per_rank[mesh.tensor.rank], x.grad, grads


def column_loss(layer: ColumnParallelLinear, ys: tuple[Tensor, ...], rank: int) -> Tensor:
    parts = [
        (y * draw(f"{output.name}{rank}", *y.shape, dtype=y.dtype)).sum()
        for output, y in zip(layer.outputs, ys, strict=True)
    ]
    return torch.stack(parts).sum()


def save_every_product(ctx: object, op: object, *args: object, **kwargs: object) -> Any:
    saved = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def column_errors(ranks: Ranks, tensor: int, gather: bool, recompute: str) -> dict[str, float]:
    mesh = ranks.mesh(tensor)
    axis, dtype = mesh.tensor, torch.float64
    x, full, ys, x_grad, grads = plain_column(mesh, dtype)
    layer = ColumnParallelLinear(IN, outputs_with_few_kv_heads(axis), mesh, dtype=dtype)
    load(layer, full)
    shard = local_slice(x, axis).clone().requires_grad_()

    def forward(piece: Tensor) -> tuple[Tensor, ...]:
        return layer(piece) if gather else layer(gather_sequence(piece, axis), gather=False)

    if recompute == "none":
        found = forward(shard)
    elif recompute == "full":
        found = checkpoint(forward, shard, use_reentrant=False)
    else:
        contexts = partial(create_selective_checkpoint_contexts, save_every_product)
        found = checkpoint(forward, shard, use_reentrant=False, context_fn=contexts)
    column_loss(layer, found, axis.rank).backward()
    errors = {o.name: error(a, b) for o, a, b in zip(layer.outputs, found, ys, strict=True)}
    errors |= gradient_errors(layer, grads)
    assert shard.grad is not None
    return errors | {"x": error(shard.grad, local_slice(x_grad, axis))}


def bf16_errors(ranks: Ranks) -> dict[str, tuple[float, float]]:
    """(ours, plain bf16) against float64 of both layers in a row, from the same bf16 values."""
    mesh, bf16 = ranks.mesh(), torch.bfloat16
    axis, wide = mesh.tensor, 256
    values = {
        "x": draw("x", 64, BATCH, wide, dtype=bf16),
        "up": draw("up", wide, wide, dtype=bf16) / 16,
        "down": draw("down", wide, wide, dtype=bf16) / 16,
    }
    grad_logits = draw("slope", 64, BATCH, wide, dtype=bf16)

    def plain(dtype: torch.dtype) -> dict[str, Tensor]:
        leaf = {name: v.to(dtype, copy=True).requires_grad_() for name, v in values.items()}
        y = F.linear(F.linear(leaf["x"], leaf["up"]).tanh(), leaf["down"])
        y.backward(grad_logits.to(dtype))
        return {"y": y.detach()} | {name: v.grad for name, v in leaf.items() if v.grad is not None}

    truth, usual = plain(torch.float64), plain(bf16)
    up = ColumnParallelLinear(wide, (Output("up", wide),), mesh, dtype=bf16)
    down = RowParallelLinear(wide, wide, "down", mesh, dtype=bf16)
    for layer in (up, down):
        load(layer, values)
    x = local_slice(values["x"], axis).clone().requires_grad_()
    y = down(up(x)[0].tanh())
    y.backward(local_slice(grad_logits, axis))
    assert x.grad is not None and up.weight is not None
    assert up.weight.grad is not None and down.weight.grad is not None
    assert up.weight.grad.dtype == down.weight.grad.dtype == bf16
    ours = {"y": y, "x": x.grad, "up": up.weight.grad, "down": down.weight.grad}

    def mine(found: dict[str, Tensor], name: str) -> Tensor:
        if name in ("x", "y"):
            return local_slice(found[name], axis)
        return found[name].chunk(axis.size, dim=0 if name == "up" else 1)[axis.rank]

    return {
        name: (error(ours[name], mine(truth, name)), error(mine(usual, name), mine(truth, name)))
        for name in ours
    }


def row_errors(ranks: Ranks, tensor: int, reduce: bool) -> dict[str, float]:
    mesh = ranks.mesh(tensor)
    axis, out = mesh.tensor, 10
    x = draw("x", SEQ, BATCH, 16).requires_grad_()
    weights = {name: draw(name, out, 16).requires_grad_() for name in ("a", "b")}
    plain = F.linear(x, weights["a"]) + F.linear(x, weights["b"])
    (plain * draw("c", *plain.shape)).sum().backward()

    local = x.detach().chunk(axis.size, dim=-1)[axis.rank].clone().requires_grad_()
    layers = torch.nn.ModuleList(RowParallelLinear(16, out, name, mesh) for name in weights)
    layers.double()
    load(layers, {name: weight.detach() for name, weight in weights.items()})
    partial_sums = [layer(local, reduce=reduce) for layer in layers]
    y = partial_sums[0] + partial_sums[1]
    y = y if reduce else scatter_sequence(y, axis)
    (y * local_slice(draw("c", *plain.shape), axis)).sum().backward()
    assert x.grad is not None and local.grad is not None
    grads = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    expected = x.grad.chunk(axis.size, dim=-1)[axis.rank]
    return gradient_errors(layers, grads) | {
        "y": error(y, local_slice(plain.detach(), axis)),
        "x": error(local.grad, expected),
    }


def frozen_column(ranks: Ranks) -> dict[str, bool]:
    """Which gradients exist when the input or the weights take none, and what no_grad keeps."""
    mesh = ranks.mesh()
    layer = ColumnParallelLinear(IN, (Output("a.weight", 4), Output("b.weight", 3, False)), mesh)
    x = torch.randn(2, 1, IN)
    sum(y.sum() for y in layer(x)).backward()
    only_weights = all(parameter.grad is not None for parameter in layer.parameters())
    layer.requires_grad_(False).zero_grad()
    x.requires_grad_()
    sum(y.sum() for y in layer(x)).backward()
    only_input = x.grad is not None and all(p.grad is None for p in layer.parameters())
    with torch.no_grad():
        nothing = all(y.grad_fn is None for y in layer(x))
    return {"only_weights": only_weights, "only_input": only_input, "nothing": nothing}


def saved_bytes(ranks: Ranks) -> int:
    """Bytes of activations (not parameters) that a column layer keeps for backward."""
    layer = ColumnParallelLinear(IN, (Output("a.weight", 4),), ranks.mesh())
    held: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(0 if isinstance(tensor, torch.nn.Parameter) else tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(SEQ // ranks.world_size, BATCH, IN, requires_grad=True))
    return sum(held)


@layouts
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("gather", [True, False], ids=["gathers", "gathered_before"])
def test_column_layer_equals_plain_linear(
    processes: int, tensor: int, gather: bool, recompute: str
) -> None:
    for errors in run(processes, column_errors, tensor, gather, recompute):
        assert max(errors.values()) < EXACT, errors


@layouts
@pytest.mark.parametrize("reduce", [True, False], ids=["scatters", "scattered_once_for_two"])
def test_row_layer_equals_plain_linear(processes: int, tensor: int, reduce: bool) -> None:
    for errors in run(processes, row_errors, tensor, reduce):
        assert max(errors.values()) < EXACT, errors


@pytest.mark.parametrize("tensor", [2, 4])
def test_layers_in_bf16_are_at_most_twice_as_far_from_the_truth_as_plain_bf16(tensor: int) -> None:
    for errors in run(tensor, bf16_errors):
        assert all(ours < 2 * plain for ours, plain in errors.values()), errors


def test_column_layer_computes_only_the_gradients_that_are_wanted() -> None:
    for found in run(2, frozen_column):
        assert all(found.values()), found


def test_column_layer_keeps_only_its_shard_of_the_sequence() -> None:
    shard = SEQ // 2 * BATCH * IN * 4
    assert run(2, saved_bytes) == [shard, shard]


def test_output_that_keeps_rows_it_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="key.weight: rows"):
        Output("key.weight", 6, sharded=False, keep=(3, 9))
    with pytest.raises(ValueError, match="query.weight: 6 is not divisible"):
        mesh = ParallelMesh(
            tensor=Axis("tensor", 4, 0, None, (0, 1, 2, 3)),
            data=Axis.single("data"),
            device=torch.device("cpu"),
        )
        ColumnParallelLinear(IN, (Output("query.weight", 6),), mesh)
