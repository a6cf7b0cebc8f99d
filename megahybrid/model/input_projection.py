"""The input projections of a layer's branches: one product, and a name for each of its outputs."""

from collections.abc import Mapping

from megahybrid.config.model import ModelConfig
from megahybrid.parallel.linear import ColumnParallelLinear, Output
from megahybrid.parallel.mesh import ParallelMesh


class InputProjection(ColumnParallelLinear):
    """The projections of a stream that one product makes; `names` has a name for each output."""

    def __init__(
        self, config: ModelConfig, outputs: Mapping[str, Output], mesh: ParallelMesh
    ) -> None:
        super().__init__(config.hidden_size, tuple(outputs.values()), mesh)
        self.names = tuple(outputs)
