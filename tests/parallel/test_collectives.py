"""Each pair of collectives is conjugate: its backward is the adjoint of its forward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megahybrid.parallel import collectives
from megahybrid.parallel.collectives import (
    copy_to_tensor,
    gather_objects,
    gather_sequence,
    gather_sequence_replicated,
    local_slice,
    reduce_both,
    reduce_from_tensor,
    scatter_sequence,
    split_sequence,
)
from megahybrid.parallel.mesh import Axis, ParallelMesh
from tests.distributed import Ranks, run
from tests.parallel.compare import EXACT, draw, error

SEQ = 8

# name: (input is one value held by all ranks, output is, rows in, rows out) for a whole of SEQ rows
PAIRS: dict[str, tuple[bool, bool, str, str]] = {
    "copy_to_tensor": (True, False, "whole", "whole"),
    "reduce_from_tensor": (False, True, "whole", "whole"),
    "reduce_both": (False, False, "whole", "whole"),
    "gather_sequence": (False, False, "local", "whole"),
    "scatter_sequence": (False, False, "whole", "local"),
    "gather_sequence_replicated": (False, True, "local", "whole"),
    "split_sequence": (True, False, "whole", "local"),
}


def dot(a: Tensor, b: Tensor, one_value: bool, axis: Axis) -> float:
    """Inner product over the ranks; of a value that all hold, it counts once."""
    mine = float((a * b).sum())
    return mine if one_value else sum(gather_objects(mine, axis))


def dot_products(ranks: Ranks, name: str) -> tuple[float, float]:
    """<F(x), y> and <x, F*(y)>, where F* is what autograd does."""
    axis = ranks.mesh().tensor
    function: Callable[[Tensor, Axis], Tensor] = getattr(collectives, name)
    one_in, one_out, rows_in, rows_out = PAIRS[name]
    rows = {"whole": SEQ, "local": SEQ // axis.size}
    x = draw(f"x{'' if one_in else axis.rank}", rows[rows_in], 3).requires_grad_()
    y = draw(f"y{'' if one_out else axis.rank}", rows[rows_out], 3)
    result = function(x, axis)
    result.backward(y)
    assert x.grad is not None
    return (
        dot(result.detach(), y, one_out, axis),
        dot(x.detach(), x.grad, one_in, axis),
    )


def forward_errors(ranks: Ranks) -> dict[str, float]:
    """Each forward against its definition, all ranks' inputs known to every rank."""
    axis = ranks.mesh().tensor
    local = SEQ // axis.size
    wholes = [draw(f"whole{rank}", SEQ, 3) for rank in range(axis.size)]
    shards = [draw(f"shard{rank}", local, 3) for rank in range(axis.size)]
    mine, shard = wholes[axis.rank].clone(), shards[axis.rank].clone()
    total, joined = torch.stack(wholes).sum(0), torch.cat(shards)
    return {
        "copy": error(copy_to_tensor(mine, axis), mine),
        "reduce_from": error(reduce_from_tensor(mine, axis), total),
        "reduce_both": error(reduce_both(mine, axis), total),
        "gather": error(gather_sequence(shard, axis), joined),
        "gather_replicated": error(gather_sequence_replicated(shard, axis), joined),
        "scatter": error(scatter_sequence(mine, axis), local_slice(total, axis)),
        "split": error(split_sequence(total, axis), local_slice(total, axis)),
        "input_untouched": error(mine, wholes[axis.rank]),
    }


def norm_weight_gradient(ranks: Ranks, wrapped: bool) -> float:
    """Error of a replicated weight's gradient when it multiplies a shard of the sequence."""
    axis = ranks.mesh().tensor
    x, weight = draw("x", SEQ, 5), draw("weight", 5).requires_grad_()
    (x * weight).pow(2).sum().backward()
    assert weight.grad is not None
    own = weight.detach().clone().requires_grad_()
    read = copy_to_tensor(own, axis) if wrapped else own
    (local_slice(x, axis) * read).pow(2).sum().backward()
    assert own.grad is not None
    return error(own.grad, weight.grad)


def agreements(ranks: Ranks) -> dict[str, object]:
    """The collectives that carry no gradient."""
    axis = ranks.mesh().tensor
    mine = torch.full((2,), float(axis.rank))
    return {
        "sum": collectives.sum_scalars([1.0, axis.rank], axis),
        "max": collectives.all_reduce(mine[:1].clone(), axis, "max").tolist(),
        "min": collectives.all_reduce(mine[:1].clone(), axis, "min").tolist(),
        "broadcast": collectives.broadcast(mine, axis, source=1).tolist(),
        "object": collectives.broadcast_object({"rank": axis.rank}, axis),
        "objects": gather_objects(axis.rank, axis),
        "barrier": collectives.barrier(axis),
    }


def uneven_sequence(ranks: Ranks) -> str:
    try:
        scatter_sequence(torch.zeros(ranks.world_size + 1, 2), ranks.mesh().tensor)
    except ValueError as refusal:
        return str(refusal)
    return "accepted"


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("name", PAIRS)
def test_backward_is_the_adjoint_of_forward(name: str, tensor: int) -> None:
    for forward, backward in run(tensor, dot_products, name):
        assert forward == pytest.approx(backward, rel=1e-12)


@pytest.mark.parametrize("tensor", [2, 4])
def test_forward_is_what_its_name_says_and_leaves_its_input_alone(tensor: int) -> None:
    for errors in run(tensor, forward_errors):
        assert max(errors.values()) < EXACT, errors


@pytest.mark.parametrize("name", PAIRS)
def test_nothing_happens_along_an_axis_of_one(name: str) -> None:
    x = torch.randn(4, 2, requires_grad=True)
    assert getattr(collectives, name)(x, ParallelMesh.single().tensor) is x


def test_replicated_weight_on_a_shard_needs_copy_to_tensor() -> None:
    assert max(run(2, norm_weight_gradient, True)) < EXACT
    assert min(run(2, norm_weight_gradient, False)) > 0.1  # so the test above can fail


def test_ranks_agree_on_numbers_and_objects() -> None:
    expected = {
        "sum": [4.0, 6.0],
        "max": [3.0],
        "min": [0.0],
        "broadcast": [1.0, 1.0],
        "object": {"rank": 0},
        "objects": [0, 1, 2, 3],
        "barrier": None,
    }
    assert run(4, agreements) == [expected] * 4


def test_sequence_that_does_not_divide_is_refused() -> None:
    for refusal in run(2, uneven_sequence):
        assert refusal == "a sequence of 3 is not divisible by the tensor degree 2"
