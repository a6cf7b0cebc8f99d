"""Linear layers cut over the tensor axis, with the sequence cut outside of them.

Activations are [seq, batch, features]: gathering and scattering the sequence then moves whole
contiguous blocks. With a tensor axis of size 1 both layers are `nn.Linear` without bias.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from megahybrid.parallel.collectives import (
    all_gather,
    all_reduce,
    scatter_sequence,
    start_all_gather,
    start_reduce_scatter,
)
from megahybrid.parallel.matmul import linear, product
from megahybrid.parallel.mesh import Axis, ParallelMesh
from megahybrid.parallel.sharding import Segment, ShardSpec, attach_shard_spec, shard_spec


@dataclass(frozen=True)
class Output:
    """One canonical weight [features, in_features] that a column-parallel layer computes with.

    Not `sharded`: every rank holds the whole weight and uses its rows `keep` (all when None), as
    for key and value heads fewer than tensor ranks. Sharded, each rank has `filler` rows of zeros
    behind its own, whose products nobody is given.
    """

    name: str
    features: int
    sharded: bool = True
    keep: tuple[int, int] | None = None
    filler: int = 0

    def __post_init__(self) -> None:
        start, stop = self.kept
        if (self.sharded and self.keep is not None) or not 0 <= start < stop <= self.features:
            raise ValueError(f"{self.name}: rows {self.keep} of {self.features} cannot be kept")

    @property
    def kept(self) -> tuple[int, int]:
        """Rows of a replicated weight that this rank uses."""
        return self.keep or (0, self.features)


class ColumnParallelLinear(nn.Module):
    """y = x Wᵀ for several weights at once, each cut by rows (outputs) over the tensor axis.

    `weight` [sum of local features, in_features] fuses the sharded outputs in order; `replicated`
    has one parameter per unsharded output, in order. A weight's gradient is in the weight's dtype,
    products are in the input's.
    """

    def __init__(
        self,
        in_features: int,
        outputs: tuple[Output, ...],
        mesh: ParallelMesh,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.outputs, self.axis = in_features, outputs, mesh.tensor
        cut = tuple(
            Segment(o.name, (o.features, in_features), 0, o.filler) for o in outputs if o.sharded
        )
        whole = [Segment(o.name, (o.features, in_features), None) for o in outputs if not o.sharded]
        # Rows of each in `weight`, its filler with them.
        self.sizes = [segment.shape[0] // self.axis.size + segment.filler for segment in cut]
        self.weight = sharded_parameter(cut, mesh, dtype) if cut else None
        # Direct attributes, not a ParameterList: ZeRO-3 gathers a module's own parameters when that
        # module runs, and a list never runs.
        for index, segment in enumerate(whole):
            setattr(self, f"replicated_{index}", sharded_parameter((segment,), mesh, dtype))

    @property
    def replicated(self) -> list[nn.Parameter]:
        """The parameters of the unsharded outputs, in order."""
        count = sum(not output.sharded for output in self.outputs)
        return [getattr(self, f"replicated_{index}") for index in range(count)]

    def forward(
        self, x: Float[Tensor, "seq_local batch in_features"], gather: bool = True
    ) -> tuple[Float[Tensor, "seq batch _"], ...]:
        """One [seq, batch, local features] per output, in order.

        With `gather`, x is this rank's shard of the sequence: only the shard is kept and gathered
        again in backward, because the whole would cost seq × batch × hidden per layer. Without,
        x is already whole (through `gather_sequence`, whose backward sums over the ranks).
        """
        weights = ([] if self.weight is None else [self.weight]) + self.replicated
        fused: list[tuple[int, int] | None] = [None] if self.weight is not None else []
        kept = tuple(fused + [output.kept for output in self.outputs if not output.sharded])
        if self.axis.size == 1:
            computed = [_product(x, w, rows) for w, rows in zip(weights, kept, strict=True)]
        else:
            computed = list(_ColumnLinear.apply(x, self.axis, gather, kept, *weights))
        return by_output(self.outputs, self.sizes, computed)

    def extra_repr(self) -> str:
        """Sizes and the canonical names computed."""
        return f"{self.in_features} -> {', '.join(o.name for o in self.outputs)}"


def by_output(
    outputs: tuple[Output, ...], sizes: list[int], computed: list[Tensor]
) -> tuple[Tensor, ...]:
    """Return what was `computed` for each output, in order: the fused ones together, first, with
    as many rows each as `sizes` says, then those alone."""
    alone = iter(computed)
    pieces = iter(next(alone).split(sizes, dim=-1) if sizes else ())
    return tuple(
        next(alone) if not output.sharded else without_filler(next(pieces), output)
        for output in outputs
    )


def without_filler(piece: Tensor, output: Output) -> Tensor:
    """Return the products with an output's own rows."""
    return piece[..., : -output.filler] if output.filler else piece


class RowParallelLinear(nn.Module):
    """y = x Wᵀ with W cut by columns (input features): each rank's product is a partial sum."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        name: str,
        mesh: ParallelMesh,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.axis = mesh.tensor
        segment = Segment(name, (out_features, in_features), 1)
        self.weight = sharded_parameter((segment,), mesh, dtype)

    def forward(
        self, x: Float[Tensor, "seq batch in_local"], reduce: bool = True
    ) -> Float[Tensor, "seq_out batch out"]:
        """The sum, scattered to [seq_local, batch, out]; without `reduce` this rank's partial sum.

        Partial sums of several layers can be added and scattered once by `scatter_sequence`.
        """
        partial = _product(x, self.weight, None)
        return scatter_sequence(partial, self.axis) if reduce else partial

    def extra_repr(self) -> str:
        """The local shape and the canonical name."""
        return f"{shard_spec(self.weight).segments[0].name}, local {tuple(self.weight.shape)}"


def sharded_parameter(
    segments: tuple[Segment, ...],
    mesh: ParallelMesh,
    dtype: torch.dtype | None = None,
    padded: int | None = None,
    value: float = 0.0,
) -> nn.Parameter:
    """Return a parameter of this rank's shape with its spec, everywhere `value`.

    `random.fill_normal` draws the values of matrices.
    """
    spec = ShardSpec(segments, mesh.tensor.size, mesh.tensor.rank, padded)
    filled = torch.full(spec.parameter_shape, value, dtype=dtype, device=mesh.device)
    return attach_shard_spec(nn.Parameter(filled), spec)


def _product(x: Tensor, weight: Tensor, rows: tuple[int, int] | None) -> Tensor:
    """x Wᵀ with some rows of the weight, in x's dtype."""
    return linear(x, rows_of(weight, rows))


def rows_of(weight: Tensor, rows: tuple[int, int] | None) -> Tensor:
    """Rows of a weight; the weight itself, not a view, where that is all of them."""
    if rows is None or rows == (0, weight.shape[0]):
        return weight
    return weight[rows[0] : rows[1]]


class _ColumnLinear(torch.autograd.Function):
    """Gathers, multiplies and keeps the shard; backward overlaps its collectives with products.

    Weights are saved as the leaf parameters they are: ZeRO-3 swaps their storage between forward
    and backward, and a view would keep the gathered one alive.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        axis: Axis,
        gather: bool,
        kept: tuple[tuple[int, int] | None, ...],
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.axis, ctx.gather, ctx.kept = axis, gather, kept
        ctx.save_for_backward(x, *weights)
        whole = all_gather(x, axis) if gather else x
        return tuple(_product(whole, w, rows) for w, rows in zip(weights, kept, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        axis, gather = ctx.axis, ctx.gather
        needs_x, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        gathering = start_all_gather(x, axis) if gather and any(needs_weight) else None
        grad_x = scattering = None
        if needs_x:
            grad_x = _input_gradient(grads, weights, ctx.kept)
            if gather:
                scattering = start_reduce_scatter(grad_x, axis)
        weight_grads: list[Tensor | None] = [None] * len(weights)
        if any(needs_weight):
            whole = (gathering.wait() if gathering is not None else x).flatten(0, 1)
            for index, (grad, weight, rows) in enumerate(
                zip(grads, weights, ctx.kept, strict=True)
            ):
                if needs_weight[index]:
                    of_rows = product(grad.flatten(0, 1).t(), whole).to(weight.dtype)
                    weight_grads[index] = weight_gradient(of_rows, weight, rows, axis)
        if scattering is not None:
            grad_x = scattering.wait()
        return grad_x, None, None, None, *weight_grads


def _input_gradient(
    grads: tuple[Tensor, ...],
    weights: list[Tensor],
    kept: tuple[tuple[int, int] | None, ...],
) -> Tensor:
    """This rank's partial sum of the gradient of the whole input."""
    total: Tensor | None = None
    for grad, weight, rows in zip(grads, weights, kept, strict=True):
        part = product(grad, rows_of(weight, rows).to(grad.dtype))
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def weight_gradient(
    of_rows: Tensor, weight: Tensor, rows: tuple[int, int] | None, axis: Axis
) -> Tensor:
    """The gradient of a shard; of a replicated weight, the sum over ranks of what each one used."""
    if rows is None:
        return of_rows
    whole = torch.zeros_like(weight)
    whole[rows[0] : rows[1]] = of_rows
    return all_reduce(whole, axis)
