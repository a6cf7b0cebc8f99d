"""Biases of queries, keys and values, as Qwen2 has them.

They are added where heads are made, behind whatever product made them: the matrix that is fused
with others, the one of a chunked MLP, in a compiled region or not.
"""

from jaxtyping import Float
from torch import Tensor, nn

from megahybrid.parallel.collectives import copy_to_tensor
from megahybrid.parallel.linear import sharded_parameter
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.parallel.sharding import Segment


class ProjectionBiases(nn.Module):
    """Adds one learned vector [heads * head_dim] each to queries, keys and values.

    They are cut by heads as the rows of their weights are. With more tensor ranks than KV heads
    those of keys and values are replicated, and each rank reads the part of its head. `name` is the
    layer's attention, for example blocks.3.attention.
    """

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, name: str, mesh: ParallelMesh
    ) -> None:
        super().__init__()
        self.head_dim, self.kv_heads, self.tensor = head_dim, num_kv_heads, mesh.tensor
        self.query = _bias(f"{name}.query.bias", num_heads * head_dim, True, mesh)
        cut = num_kv_heads >= mesh.tensor.size
        self.key = _bias(f"{name}.key.bias", num_kv_heads * head_dim, cut, mesh)
        self.value = _bias(f"{name}.value.bias", num_kv_heads * head_dim, cut, mesh)

    def forward(
        self,
        q: Float[Tensor, "seq batch query_features_local"],
        k: Float[Tensor, "seq batch kv_features_local"],
        v: Float[Tensor, "seq batch kv_features_local"],
    ) -> tuple[
        Float[Tensor, "seq batch query_features_local"],
        Float[Tensor, "seq batch kv_features_local"],
        Float[Tensor, "seq batch kv_features_local"],
    ]:
        """Queries, keys and values with their biases, in their own dtypes."""
        return (
            q + self.query.to(q.dtype),
            k + self._of_kv_head(self.key).to(k.dtype),
            v + self._of_kv_head(self.value).to(v.dtype),
        )

    def _of_kv_head(self, bias: nn.Parameter) -> Tensor:
        """This rank's part of a bias. Where it is replicated its gradient is of one head: the parts
        of all ranks are added up."""
        if self.kv_heads >= self.tensor.size:
            return bias
        head = self.tensor.rank * self.kv_heads // self.tensor.size
        whole: Tensor = copy_to_tensor(bias, self.tensor)
        return whole[head * self.head_dim : (head + 1) * self.head_dim]


def _bias(name: str, features: int, cut: bool, mesh: ParallelMesh) -> nn.Parameter:
    segment = Segment(name, (features,), 0 if cut else None)
    return sharded_parameter((segment,), mesh)
