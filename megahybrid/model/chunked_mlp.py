"""The MLP chunk by chunk along the sequence (arXiv 2506.13996): gate, up and their product stand
for one chunk at a time, and backward computes them again."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, assert_never

import torch
from jaxtyping import Float
from torch import Tensor, nn

from megahybrid.config import chunk_sizes
from megahybrid.config.model import Activation
from megahybrid.model.compiled import traced_whole
from megahybrid.model.geglu import gelu_gated, gelu_gated_gradients
from megahybrid.model.input_projection import InputProjection
from megahybrid.model.swiglu import silu_gated, silu_gated_gradients
from megahybrid.parallel.collectives import all_gather, start_all_gather, start_reduce_scatter
from megahybrid.parallel.linear import (
    RowParallelLinear,
    by_output,
    rows_of,
    weight_gradient,
)
from megahybrid.parallel.matmul import accumulate, linear, product
from megahybrid.parallel.mesh import Axis


@dataclass(frozen=True)
class ChunkFunctions:
    """The functions between the products of one chunk."""

    gated: Callable[[Tensor, Tensor], Tensor]
    gradients: Callable[[Tensor, Tensor, Tensor], Tensor]


def between(activation: Activation) -> ChunkFunctions:
    """Return the functions of an activation."""
    match activation:
        case "silu":
            return ChunkFunctions(silu_gated, silu_gated_gradients)
        case "gelu_tanh":
            return ChunkFunctions(gelu_gated, gelu_gated_gradients)
        case never:
            assert_never(never)


class ChunkedMLP(nn.Module):
    """An input projection that ends in gate and up, and all that the MLP makes of these two.

    Costs the product with gate and up once more, 4 d f FLOPs a token, and no communication. The
    parameters are those of `input` and `down`: registered here as well, because ZeRO-3 gathers a
    module's own parameters when that module runs.
    """

    def __init__(
        self, input: InputProjection, down: RowParallelLinear, activation: Activation = "silu"
    ) -> None:
        super().__init__()
        assert input.names[-2:] == ("gate", "up")
        assert all(output.sharded for output in input.outputs[-2:])
        self.names = (*input.names[:-2], "mlp")  # of what `forward` gives, as in BranchInputs
        self.outputs, self.sizes = input.outputs[:-2], input.sizes[:-2]
        self.kept = tuple(output.kept for output in self.outputs if not output.sharded)
        self.axis, self.weight, self.down = input.axis, input.weight, down.weight
        self.between = self.plain = between(activation)
        for index, parameter in enumerate(input.replicated):
            setattr(self, f"replicated_{index}", parameter)

    def compile_pieces(self, backend: str) -> None:
        """Have what lies between a chunk's products compiled when gradients are wanted."""
        self.between = ChunkFunctions(
            traced_whole(self.plain.gated, backend), traced_whole(self.plain.gradients, backend)
        )

    def forward(
        self, x: Float[Tensor, "seq_local batch hidden"], needed: bool = True
    ) -> tuple[Float[Tensor, "seq batch _"], ...]:
        """The outputs of `input` but for gate and up, then this rank's part of the MLP's sum.

        That part is zero where it is not `needed`: a layer computed again for its backward reads
        it nowhere.
        """
        replicated = [getattr(self, f"replicated_{index}") for index in range(len(self.kept))]
        between = self.between if torch.is_grad_enabled() else self.plain
        setup = _Setup(
            self.axis, sum(self.sizes), self.kept, chunk_sizes.CHUNK_TOKENS, needed, between
        )
        *heads, branch = _ChunkedMLP.apply(x, setup, self.weight, self.down, *replicated)
        return (*by_output(self.outputs, self.sizes, heads), branch)


@dataclass(frozen=True)
class _Setup:
    axis: Axis
    heads: int  # rows of the fused weight before gate and up
    kept: tuple[tuple[int, int], ...]  # of each replicated weight
    chunk: int  # tokens
    needed: bool
    between: ChunkFunctions

    def chunks(self, tokens: int) -> Iterator[slice]:
        return (slice(at, at + self.chunk) for at in range(0, tokens, self.chunk))

    def parts(
        self, weight: Tensor, replicated: tuple[Tensor, ...] | list[Tensor]
    ) -> list[tuple[Tensor, tuple[int, int] | None]]:
        """The weights of all outputs but gate and up, and what rows of them."""
        fused = [(weight[: self.heads], None)] if self.heads else []
        return [*fused, *zip(replicated, self.kept, strict=True)]


class _ChunkedMLP(torch.autograd.Function):
    """Gathers once, scatters the gradient once, and keeps the shard of its input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, setup: _Setup, weight: Tensor, down: Tensor, *replicated: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.setup = setup
        ctx.save_for_backward(x, weight, down, *replicated)
        whole = all_gather(x, setup.axis)
        heads = [linear(whole, rows_of(w, r)) for w, r in setup.parts(weight, replicated)]
        shape = (*whole.shape[:-1], down.shape[0])
        if not setup.needed:
            return (*heads, whole.new_zeros(()).expand(shape))
        flat, gate_up, way_down = whole.flatten(0, 1), weight[setup.heads :], down.t().to(x.dtype)
        branch = whole.new_empty(shape)
        for chunk in setup.chunks(flat.shape[0]):
            gate, up = linear(flat[chunk], gate_up).chunk(2, dim=-1)
            product(setup.between.gated(gate, up), way_down, out=branch.flatten(0, 1)[chunk])
        return (*heads, branch)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, *replicated = ctx.saved_tensors
        setup: _Setup = ctx.setup
        gathering = start_all_gather(x, setup.axis)
        *grad_heads, grad_branch = (grad.flatten(0, 1) for grad in grads)
        whole = gathering.wait().flatten(0, 1)
        grad_x, grad_gate_up, grad_down = _of_chunks(setup, whole, grad_branch, weight, down)
        parts = setup.parts(weight, replicated)
        for grad, (part, rows) in zip(grad_heads, parts, strict=True):
            grad_x.add_(product(grad, rows_of(part, rows).to(grad.dtype)))
        scattering = start_reduce_scatter(grad_x.view(-1, *x.shape[1:]), setup.axis)
        grad_parts = [
            weight_gradient(product(grad.t(), whole).to(part.dtype), part, rows, setup.axis)
            for grad, (part, rows) in zip(grad_heads, parts, strict=True)
        ]
        grad_weight = grad_gate_up
        if setup.heads:
            grad_weight = torch.cat((grad_parts.pop(0), grad_gate_up))
        return scattering.wait(), None, grad_weight, grad_down, *grad_parts


def _of_chunks(
    setup: _Setup, inputs: Tensor, grads: Tensor, weight: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the gathered input, and of gate, up and down's weights; sums in fp32 or better,
    because a chunk's share would lose its digits in bf16."""
    dtype, exact = inputs.dtype, torch.promote_types(inputs.dtype, torch.float32)
    gate_up, way_down = weight[setup.heads :].to(dtype), down.to(dtype)
    grad_inputs = torch.empty_like(inputs)
    grad_gate_up = torch.zeros_like(gate_up, dtype=exact)
    grad_down = torch.zeros_like(down, dtype=exact)
    for chunk in setup.chunks(inputs.shape[0]):
        both = linear(inputs[chunk], gate_up)
        grad = product(grads[chunk], way_down)
        gate, up = both.chunk(2, dim=-1)
        made = setup.between.gradients(gate, up, grad)  # `both` is their gradient now
        del grad
        accumulate(grad_down, grads[chunk], made)
        del made
        product(both, gate_up, out=grad_inputs[chunk])
        accumulate(grad_gate_up, both, inputs[chunk])
    return grad_inputs, grad_gate_up.to(weight.dtype), grad_down.to(down.dtype)
