"""What a layer's input projections give its branches, by name."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from megahybrid.config.model import ModelConfig
from megahybrid.parallel.linear import ColumnParallelLinear, Output
from megahybrid.parallel.mesh import ParallelMesh


class Heads(NamedTuple):
    """What attention computes with: [seq, batch, heads_local, head_dim]."""

    query: Tensor
    key: Tensor
    value: Tensor


class BranchInputs(NamedTuple):
    """What the second half of a layer reads beside the attention output: one field for each output
    of the input projection that is not heads; None where a block has none.

    Of the MLP it is gate and up, or their product, or all that the MLP made of them.
    """

    gate: Tensor | None = None
    up: Tensor | None = None
    gated: Tensor | None = None  # silu(gate) * up
    mlp: Tensor | None = None  # this rank's part of the MLP's sum


class InputProjection(ColumnParallelLinear):
    """The projections of a stream that one product makes; `names` has a name for each output."""

    def __init__(
        self, config: ModelConfig, outputs: Mapping[str, Output], mesh: ParallelMesh
    ) -> None:
        super().__init__(config.hidden_size, tuple(outputs.values()), mesh)
        self.names = tuple(outputs)
