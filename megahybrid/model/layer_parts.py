"""The parts that layers are built of, made alike for every block: a new part is added here."""

from dataclasses import dataclass

from torch import nn

from megahybrid.config.attention import AttentionScheme
from megahybrid.config.model import ModelConfig
from megahybrid.config.stages import Recompute
from megahybrid.model.attention import Attention, attention_outputs
from megahybrid.model.chunked_mlp import ChunkedMLP
from megahybrid.model.fusion import TwoViews
from megahybrid.model.input_projection import InputProjection
from megahybrid.model.mlp import MLP, GatedProduct, mlp_outputs
from megahybrid.model.norm import make_norm
from megahybrid.model.recompute import recomputation
from megahybrid.parallel.linear import RowParallelLinear
from megahybrid.parallel.mesh import ParallelMesh


@dataclass(frozen=True)
class LayerParts:
    """Makes the parts of layer `index`. `norm_function` names the implementation of RMSNorm.

    The order in which a block asks for them is the order of its parameters, in which ZeRO lays
    them out: a file of one rank's parameters that was written before is read by it.
    """

    index: int
    config: ModelConfig
    scheme: AttentionScheme
    mesh: ParallelMesh
    kernel: str
    policy: Recompute
    norm_function: str

    def name(self, part: str) -> str:
        """Return the canonical name of a part."""
        return f"blocks.{self.index}.{part}"

    def norm(self, part: str) -> nn.Module:
        """Return a norm of the stream, or of what is added to it."""
        return make_norm(self.config, self.name(part), self.mesh, self.norm_function)

    def input(self, *, attention: bool = False, mlp: bool = False) -> InputProjection:
        """Return the input projection of these branches; gate and up come last."""
        outputs = attention_outputs(self.name("attention"), self.config, self.scheme, self.mesh)
        of_mlp = mlp_outputs(self.name("mlp"), self.config)
        chosen = (outputs if attention else {}) | (of_mlp if mlp else {})
        return InputProjection(self.config, chosen, self.mesh)

    def attention(self) -> Attention:
        """Return attention between its projections, and its way back."""
        kind = Attention if self.scheme.near is None else TwoViews
        return kind(self.name("attention"), self.config, self.scheme, self.mesh, self.kernel)

    def gated_product(self) -> GatedProduct:
        """Return an MLP without its input projection."""
        selective = recomputation(self.policy).norms
        return GatedProduct(self.name("mlp"), self.config, self.mesh, selective)

    def mlp(self) -> MLP:
        """Return an MLP with its input projection."""
        return MLP(self.input(mlp=True), self.gated_product())

    def chunked(self, input: InputProjection, down: RowParallelLinear) -> ChunkedMLP | None:
        """Return an MLP in chunks beside the plain one, with the same parameters; None where no
        sequence is cut."""
        if recomputation(self.policy).chunks == "never":
            return None
        return ChunkedMLP(input, down, self.config.activation)
