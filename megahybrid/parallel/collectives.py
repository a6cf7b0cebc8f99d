"""Collectives along an `Axis`: plain ones, and conjugate autograd pairs between regions.

The pairs follow Megatron-LM (arXiv 1909.08053, 2205.05198): each backward is the adjoint of its
forward, so the gradient of the whole is right without hooks. Along an axis of size 1 all of them
return their input. Tensors along the sequence have it as dimension 0.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

from megahybrid.errors import MegahybridError
from megahybrid.parallel.mesh import Axis

T = TypeVar("T")

# torch 2.13 renamed both; the older names still warn or vanish, the newer do not exist before.
_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class Pending:
    """A result under way: `wait()` gives it. Keeps its input alive until then."""

    def __init__(self, result: Tensor, work: dist.Work | None, source: Tensor) -> None:
        self.result, self._work, self._source = result, work, source

    def wait(self) -> Tensor:
        """The result, once the collective has finished on this rank (on CUDA: in stream order)."""
        if self._work is not None:
            self._work.wait()
        return self.result


class _PendingSum(Pending):
    """As `Pending`, for what this rank has to add up itself when it has come."""

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
            self._work = None
            torch.sum(self._source.view(-1, *self.result.shape), dim=0, out=self.result)
        return self.result


def all_reduce(
    x: Shaped[Tensor, "*shape"], axis: Axis, operation: str = "sum"
) -> Shaped[Tensor, "*shape"]:
    """Sum, max or min over the axis, IN PLACE. Returns its argument."""
    if axis.size > 1:
        dist.all_reduce(x, op=_OPERATIONS[operation], group=axis.group)
    return x


def start_all_gather(x: Shaped[Tensor, "n *rest"], axis: Axis) -> Pending:
    """All ranks' slices along dimension 0, in rank order: [n * size, *rest]."""
    x = x.contiguous()
    if axis.size == 1:
        return Pending(x, None, x)
    result = x.new_empty((x.shape[0] * axis.size, *x.shape[1:]))
    return Pending(result, _gather_single(result, x, group=axis.group, async_op=True), x)


def start_reduce_scatter(x: Shaped[Tensor, "n *rest"], axis: Axis) -> Pending:
    """This rank's slice along dimension 0 of the sum over ranks: [n / size, *rest]."""
    x = x.contiguous()
    if axis.size == 1:
        return Pending(x, None, x)
    _check_divides(x.shape[0], axis)
    result = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    return Pending(result, _scatter_single(result, x, group=axis.group, async_op=True), x)


def start_sum_of_slices(x: Shaped[Tensor, "n"], axis: Axis) -> Pending:
    """The sum over the axis of this rank's slice of `x`, IN PLACE: the slice is the result, and the
    rest of `x` is of no use afterwards. Nobody may touch `x` until it is waited for."""
    if axis.size == 1:
        return Pending(x, None, x)
    own = local_slice(x, axis)
    if dist.get_backend(axis.group) == "gloo":
        # Its own reduce-scatter sums a copy of everything on every rank, in torch 2.13.
        received = torch.empty_like(x)
        work = dist.all_to_all_single(received, x, group=axis.group, async_op=True)
        return _PendingSum(own, work, received)
    return Pending(own, _scatter_single(own, x, group=axis.group, async_op=True), x)


def start_gather_of_slices(x: Shaped[Tensor, "n"], axis: Axis) -> Pending:
    """Every rank's slice of `x` in its place, IN PLACE: nobody may read `x` until it is waited for,
    or write its own slice."""
    if axis.size == 1:
        return Pending(x, None, x)
    work = _gather_single(x, local_slice(x, axis), group=axis.group, async_op=True)
    return Pending(x, work, x)


def all_gather(x: Shaped[Tensor, "n *rest"], axis: Axis) -> Shaped[Tensor, "m *rest"]:
    """`start_all_gather`, waited for."""
    return start_all_gather(x, axis).wait()


def reduce_scatter(x: Shaped[Tensor, "n *rest"], axis: Axis) -> Shaped[Tensor, "m *rest"]:
    """`start_reduce_scatter`, waited for."""
    return start_reduce_scatter(x, axis).wait()


def local_slice(x: Shaped[Tensor, "n *rest"], axis: Axis) -> Shaped[Tensor, "m *rest"]:
    """This rank's slice along dimension 0, a view."""
    _check_divides(x.shape[0], axis)
    length = x.shape[0] // axis.size
    return x.narrow(0, axis.rank * length, length)


def _check_divides(length: int, axis: Axis) -> None:
    if length % axis.size:
        raise ValueError(
            f"a sequence of {length} is not divisible by the {axis.name} degree {axis.size}"
        )


class _CopyToTensor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0].clone(memory_format=torch.contiguous_format), ctx.axis), None


class _ReduceFromTensor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x.clone(memory_format=torch.contiguous_format), axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _ReduceBoth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_reduce(x.clone(memory_format=torch.contiguous_format), axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0].clone(memory_format=torch.contiguous_format), ctx.axis), None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grads[0], ctx.axis), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_gather(grads[0], ctx.axis), None


class _GatherSequenceReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return local_slice(grads[0], ctx.axis), None


class _SplitSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return local_slice(x, axis).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_gather(grads[0], ctx.axis), None


def copy_to_tensor(x: Float[Tensor, "*shape"], axis: Axis) -> Float[Tensor, "*shape"]:
    """Replicated → used differently on each rank. Backward sums the ranks' partial gradients."""
    return x if axis.size == 1 else _CopyToTensor.apply(x, axis)


def reduce_from_tensor(x: Float[Tensor, "*shape"], axis: Axis) -> Float[Tensor, "*shape"]:
    """Partial sums → their sum, used alike on every rank. Backward passes the gradient on."""
    return x if axis.size == 1 else _ReduceFromTensor.apply(x, axis)


def reduce_both(x: Float[Tensor, "*shape"], axis: Axis) -> Float[Tensor, "*shape"]:
    """Partial sums → their sum, used by each rank on its own shard (statistics). Sums both ways."""
    return x if axis.size == 1 else _ReduceBoth.apply(x, axis)


def gather_sequence(x: Float[Tensor, "seq_local *rest"], axis: Axis) -> Float[Tensor, "seq *rest"]:
    """Sequence shards → the whole, used differently on each rank. Backward reduce-scatters."""
    return x if axis.size == 1 else _GatherSequence.apply(x, axis)


def scatter_sequence(x: Float[Tensor, "seq *rest"], axis: Axis) -> Float[Tensor, "seq_local *rest"]:
    """Partial sums of the whole sequence → this rank's shard of the sum. Backward all-gathers."""
    return x if axis.size == 1 else _ScatterSequence.apply(x, axis)


def gather_sequence_replicated(
    x: Float[Tensor, "seq_local *rest"], axis: Axis
) -> Float[Tensor, "seq *rest"]:
    """Sequence shards → the whole, used alike on every rank. Backward takes this rank's slice."""
    return x if axis.size == 1 else _GatherSequenceReplicated.apply(x, axis)


def split_sequence(x: Float[Tensor, "seq *rest"], axis: Axis) -> Float[Tensor, "seq_local *rest"]:
    """Replicated sequence → this rank's shard. Backward all-gathers the shards' gradients."""
    return x if axis.size == 1 else _SplitSequence.apply(x, axis)


def sum_scalars(values: Sequence[float], axis: Axis) -> list[float]:
    """Sums of Python numbers over the axis, in float64 on the CPU."""
    if axis.size == 1 or not values:
        return [float(value) for value in values]
    return all_reduce(torch.tensor(list(values), dtype=torch.float64), axis).tolist()


def broadcast(x: Shaped[Tensor, "*shape"], axis: Axis, source: int = 0) -> Shaped[Tensor, "*shape"]:
    """Overwrites `x` with that of the axis's rank `source`, IN PLACE. Returns its argument."""
    if axis.size > 1:
        dist.broadcast(x, src=axis.ranks[source], group=axis.group)
    return x


def broadcast_object(value: T, axis: Axis, source: int = 0) -> T:
    """The value of the axis's rank `source` on every rank (pickled between the ranks' memories)."""
    if axis.size == 1:
        return value
    held = [value]
    dist.broadcast_object_list(
        held, src=axis.ranks[source], group=axis.group, device=torch.device("cpu")
    )
    return held[0]


def on_first(axis: Axis, function: Callable[[], T]) -> T:
    """Return rank 0's result on every rank of the axis, or raise the MegahybridError it raised."""
    found: Any = None
    if axis.rank == 0:
        try:
            found = function()
        except MegahybridError as error:
            found = error
    found = broadcast_object(found, axis)
    if isinstance(found, MegahybridError):
        raise found
    return found


def alike(axis: Axis, function: Callable[[], T]) -> T:
    """Return this rank's result; where `function` raised a MegahybridError on some rank, raise that
    of the first such rank on every rank, so that none waits for one that has left."""
    error: MegahybridError | None = None
    try:
        found = function()
    except MegahybridError as raised:
        error = raised
    first = next((each for each in gather_objects(error, axis) if each is not None), None)
    if first is not None:
        raise first
    return found


def gather_objects(value: T, axis: Axis) -> list[T]:
    """Every rank's value, in rank order, on every rank."""
    if axis.size == 1:
        return [value]
    held: list[Any] = [None] * axis.size
    dist.all_gather_object(held, value, group=axis.group)
    return held


def barrier(axis: Axis) -> None:
    """Returns when every rank of the axis has come here."""
    sum_scalars([0.0], axis)
