"""The gated feed-forward half of a layer: down(activation(gate(u)) * up(u)), arXiv 2002.05202."""

from collections.abc import Callable
from typing import assert_never

import torch
from jaxtyping import Float
from torch import Tensor, nn

from megahybrid.config.model import Activation, ModelConfig
from megahybrid.model.geglu import geglu
from megahybrid.model.input_projection import InputProjection
from megahybrid.model.recompute import rederived
from megahybrid.model.swiglu import swiglu
from megahybrid.parallel.linear import Output, RowParallelLinear
from megahybrid.parallel.mesh import ParallelMesh


def gated_product(activation: Activation) -> Callable[[Tensor, Tensor], Tensor]:
    """Return activation(gate) * up as a function of gate and up, with its gradient."""
    match activation:
        case "silu":
            return swiglu
        case "gelu_tanh":
            return geglu
        case never:
            assert_never(never)


def mlp_outputs(name: str, config: ModelConfig) -> dict[str, Output]:
    """Return the two input projections, for a matrix that may hold others as well."""
    return {
        part: Output(f"{name}.{part}.weight", config.intermediate_size) for part in ("gate", "up")
    }


class GatedProduct(nn.Module):
    """The gated product and its way down: what follows the input projections."""

    def __init__(self, name: str, config: ModelConfig, mesh: ParallelMesh, selective: bool) -> None:
        super().__init__()
        self.selective = selective
        self.gated = gated_product(config.activation)
        self.compiled = self.gated  # until a compiler is given it
        self.down = RowParallelLinear(
            config.intermediate_size, config.hidden_size, f"{name}.down.weight", mesh
        )

    def forward(
        self,
        gate: Float[Tensor, "seq batch features_local"],
        up: Float[Tensor, "seq batch features_local"],
        reduce: bool = True,
    ) -> Float[Tensor, "seq_out batch hidden"]:
        """The shard of the result, or with reduce=False this rank's part of the sum."""
        if torch.compiler.is_compiling():
            return self.down(self.gated(gate, up), reduce=reduce)
        function = self.compiled if torch.is_grad_enabled() else self.gated
        product = function(gate, up)
        if not (self.selective and torch.is_grad_enabled()):
            return self.down(product, reduce=reduce)
        with rederived(product, function, gate.detach(), up.detach()):
            return self.down(product, reduce=reduce)


class MLP(nn.Module):
    """A whole feed-forward layer: [seq_local, batch, hidden] -> the same."""

    def __init__(self, input: InputProjection, product: GatedProduct) -> None:
        super().__init__()
        self.input, self.product = input, product

    def forward(
        self, hidden: Float[Tensor, "seq_local batch hidden"]
    ) -> Float[Tensor, "seq_local batch hidden"]:
        """down(activation(gate(hidden)) * up(hidden)), gathered on entry and scattered on exit."""
        gate, up = self.input(hidden)
        return self.product(gate, up)
