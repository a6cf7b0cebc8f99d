"""The three ways a layer joins attention and MLP to the residual stream.

pre_norm   x += attention(norm(x));  x += mlp(norm(x))
post_norm  x += norm(attention(x));  x += norm(mlp(x))
parallel   u = norm(x);  x += attention(u) + mlp(u), gathered once and scattered once
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from megahybrid.config.attention import AttentionScheme
from megahybrid.config.model import ModelConfig
from megahybrid.model.attention import Attention, attention_outputs, query_key_value
from megahybrid.model.context import SequenceContext
from megahybrid.model.mlp import MLP, GatedProduct, mlp_outputs
from megahybrid.model.norm import make_norm
from megahybrid.model.recompute import rederived
from megahybrid.parallel.collectives import scatter_sequence
from megahybrid.parallel.linear import ColumnParallelLinear
from megahybrid.parallel.mesh import ParallelMesh

Hidden = Float[Tensor, "seq_local batch hidden"]


class _Block(nn.Module):
    def __init__(self, selective: bool) -> None:
        super().__init__()
        self.selective = selective

    def _normed(self, norm: nn.Module, projection: nn.Module, hidden: Tensor) -> tuple[Tensor, ...]:
        """projection(norm(hidden)); under selective recompute the norm's output is not kept."""
        normed = norm(hidden)
        if not (self.selective and torch.is_grad_enabled()):
            return projection(normed)
        with rederived(normed, norm, hidden.detach()):
            return projection(normed)


class PreNormBlock(_Block):
    """Norm, then function, then add: Llama's order."""

    def __init__(
        self,
        index: int,
        config: ModelConfig,
        scheme: AttentionScheme,
        mesh: ParallelMesh,
        kernel: str,
        selective: bool,
        norm: str = "torch",
    ) -> None:
        super().__init__(selective)
        name = f"blocks.{index}"
        self.attention_norm = make_norm(config, f"{name}.attention_norm", mesh, norm)
        self.query_key_value = query_key_value(f"{name}.attention", config, mesh)
        self.attention = Attention(f"{name}.attention", config, scheme, mesh, kernel)
        self.mlp_norm = make_norm(config, f"{name}.mlp_norm", mesh, norm)
        self.gate_up = ColumnParallelLinear(
            config.hidden_size, mlp_outputs(f"{name}.mlp", config), mesh
        )
        self.mlp = GatedProduct(f"{name}.mlp", config, mesh, selective)

    def forward(self, hidden: Hidden, context: SequenceContext) -> Hidden:
        """One layer on this rank's part of the sequence."""
        query, key, value = self._normed(self.attention_norm, self.query_key_value, hidden)
        hidden = hidden + self.attention(query, key, value, context)
        gate, up = self._normed(self.mlp_norm, self.gate_up, hidden)
        return hidden + self.mlp(gate, up)


class PostNormBlock(_Block):
    """Function, then norm of its output, then add: Olmo 3's and Exaone 4's order."""

    def __init__(
        self,
        index: int,
        config: ModelConfig,
        scheme: AttentionScheme,
        mesh: ParallelMesh,
        kernel: str,
        selective: bool,
        norm: str = "torch",
    ) -> None:
        super().__init__(selective)
        name = f"blocks.{index}"
        self.query_key_value = query_key_value(f"{name}.attention", config, mesh)
        self.attention = Attention(f"{name}.attention", config, scheme, mesh, kernel)
        self.attention_norm = make_norm(config, f"{name}.attention_norm", mesh, norm)
        self.mlp = MLP(f"{name}.mlp", config, mesh, selective)
        self.mlp_norm = make_norm(config, f"{name}.mlp_norm", mesh, norm)

    def forward(self, hidden: Hidden, context: SequenceContext) -> Hidden:
        """One layer on this rank's part of the sequence."""
        query, key, value = self.query_key_value(hidden)
        hidden = hidden + self.attention_norm(self.attention(query, key, value, context))
        return hidden + self.mlp_norm(self.mlp(hidden))


class ParallelBlock(_Block):
    """Attention and MLP read one norm and are added together: Cohere's block."""

    def __init__(
        self,
        index: int,
        config: ModelConfig,
        scheme: AttentionScheme,
        mesh: ParallelMesh,
        kernel: str,
        selective: bool,
        norm: str = "torch",
    ) -> None:
        super().__init__(selective)
        name = f"blocks.{index}"
        self.tensor = mesh.tensor
        self.norm = make_norm(config, f"{name}.norm", mesh, norm)
        self.input = ColumnParallelLinear(
            config.hidden_size,
            attention_outputs(f"{name}.attention", config, mesh)
            + mlp_outputs(f"{name}.mlp", config),
            mesh,
        )
        self.attention = Attention(f"{name}.attention", config, scheme, mesh, kernel)
        self.mlp = GatedProduct(f"{name}.mlp", config, mesh, selective)

    def forward(self, hidden: Hidden, context: SequenceContext) -> Hidden:
        """One layer on this rank's part of the sequence."""
        query, key, value, gate, up = self._normed(self.norm, self.input, hidden)
        branch = self.attention(query, key, value, context, reduce=False)
        branch = branch + self.mlp(gate, up, reduce=False)
        return hidden + scatter_sequence(branch, self.tensor)


BLOCKS = {"pre_norm": PreNormBlock, "post_norm": PostNormBlock, "parallel": ParallelBlock}
