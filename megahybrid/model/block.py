"""The three ways a layer joins attention and MLP to the residual stream.

pre_norm   x += attention(norm(x));  x += mlp(norm(x))
post_norm  x += norm(attention(x));  x += norm(mlp(x))
parallel   u = norm(x);  x += attention(u) + mlp(u), gathered once and scattered once

Each is two stretches with the attention kernel between them: `enter`, from the residual stream to
heads, and `leave`, from mixed values back to it. A compiler gets these two, whole.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from megahybrid.config import chunk_sizes
from megahybrid.config.attention import AttentionScheme
from megahybrid.config.model import ModelConfig
from megahybrid.model.attention import Attention, Places, attention_outputs, query_key_value
from megahybrid.model.chunked_mlp import ChunkedMLP
from megahybrid.model.compiled import Passed, rows_first, traced_whole
from megahybrid.model.context import SequenceContext
from megahybrid.model.mlp import MLP, GatedProduct, mlp_outputs, swiglu
from megahybrid.model.norm import make_norm
from megahybrid.model.recompute import keeping_products, rederived
from megahybrid.model.rotary import rotate_both
from megahybrid.parallel.collectives import scatter_sequence
from megahybrid.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megahybrid.parallel.mesh import ParallelMesh

Hidden = Float[Tensor, "seq_local batch hidden"]
Heads = tuple[Tensor, Tensor, Tensor]  # q, k, v: [seq, batch, heads_local, head_dim]


class Block(nn.Module):
    """One layer. `enter` gives q, k, v and what `leave` needs beside the mixed values."""

    attention: Attention
    chunked: ChunkedMLP

    def __init__(self, policy: str, mesh: ParallelMesh) -> None:
        super().__init__()
        self.policy, self.again, self.tensor = policy, False, mesh.tensor
        self.selective = policy in ("selective", "chunked")
        self._regions: tuple[Callable[..., Any], Callable[..., Any]] | None = None

    def enter(self, hidden: Tensor) -> tuple[Heads, tuple[Tensor, ...]]:
        """From the residual stream to heads, not yet placed."""
        raise NotImplementedError

    def leave(self, hidden: Tensor, mixed: Tensor, *rest: Tensor) -> Tensor:
        """The residual stream behind this layer."""
        raise NotImplementedError

    def forward(self, hidden: Hidden, context: SequenceContext) -> Hidden:
        """One layer on this rank's part of the sequence."""
        regions = None if self._chunks(hidden) else self._regions
        if regions is not None and context.mixing is None and torch.is_grad_enabled():
            enter, leave = regions
            # Made out here, once per batch: a compiled region sees tensors alone.
            heads, (hidden, *rest) = enter(rows_first(hidden), self.attention.places(context))
            q, k, v = (x.transpose(0, 1) for x in heads)
            mixed = self.attention.attended(q, k, v, context)
            return leave(hidden, rows_first(mixed), *rest).transpose(0, 1)
        (q, k, v), rest = self.enter(hidden)
        return self.leave(hidden, self.attention(q, k, v, context), *rest)

    def compile_pieces(self, backend: str) -> None:
        """Have what is local and holds no weight compiled when gradients are wanted: the rotation
        and the gated product. Collectives, products and norms, a kernel each, stay outside."""
        self.attention.turn = traced_whole(rotate_both, backend)
        for module in self.modules():
            if isinstance(module, GatedProduct):
                module.swiglu = traced_whole(swiglu, backend)
            elif isinstance(module, ChunkedMLP):
                module.compile_pieces(backend)

    def compile_regions(self, backend: str) -> None:
        """Have `enter` (with the rotation) and `leave` compiled when gradients are wanted.

        The attention kernel stays outside: it is one call, and what it needs of a batch's documents
        is made on the host.
        """
        enter, leave = self._enter_region, self.leave
        if self.selective:
            enter, leave = keeping_products(enter), keeping_products(leave)
        self._regions = traced_whole(enter, backend), traced_whole(leave, backend)

    def _enter_region(self, hidden: Tensor, places: Places) -> tuple[Heads, tuple[Any, ...]]:
        """`enter` and the rotation, all of it [batch, seq, ...]: the order that kernels want heads
        in, and any other layer does without. The stream comes out as well: its gradient is then
        added where the norm's is made."""
        (q, k, v), rest = self.enter(hidden)
        q, k = self.attention.placed(q, k, places)
        return (q, k, v), (Passed.apply(hidden), *self.folded(rest))

    def folded(self, rest: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """What a compiled `leave` gets of `enter`'s rest."""
        return rest

    def _share(self, input: ColumnParallelLinear, down: RowParallelLinear) -> None:
        """Have an MLP in chunks beside the plain one, with the same parameters."""
        if self.policy not in ("none", "selective"):
            self.chunked = ChunkedMLP(input, down)

    def _chunks(self, hidden: Tensor) -> bool:
        """Whether the MLP of this stream runs in chunks."""
        if self.policy in ("full", "offload"):
            seq, batch = hidden.shape[:2]
            return seq * batch * self.tensor.size > chunk_sizes.CHUNK_TOKENS
        return self.policy == "chunked"

    def _chunked(self, normed: Tensor) -> tuple[Tensor, ...]:
        return self.chunked(normed, needed=not self.again)

    def _normed(
        self, norm: nn.Module, projection: Callable[[Tensor], tuple[Tensor, ...]], hidden: Tensor
    ) -> tuple[Tensor, ...]:
        """projection(norm(hidden)); under selective recompute the norm's output is not kept."""
        normed = norm(hidden)
        if not (self.selective and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return projection(normed)
        with rederived(normed, norm, hidden.detach()):
            return projection(normed)


class PreNormBlock(Block):
    """Norm, then function, then add: Llama's order."""

    def __init__(
        self,
        index: int,
        config: ModelConfig,
        scheme: AttentionScheme,
        mesh: ParallelMesh,
        kernel: str,
        policy: str,
        norm: str = "torch",
    ) -> None:
        super().__init__(policy, mesh)
        name = f"blocks.{index}"
        self.attention_norm = make_norm(config, f"{name}.attention_norm", mesh, norm)
        self.query_key_value = query_key_value(f"{name}.attention", config, mesh)
        self.attention = Attention(f"{name}.attention", config, scheme, mesh, kernel)
        self.mlp_norm = make_norm(config, f"{name}.mlp_norm", mesh, norm)
        self.gate_up = ColumnParallelLinear(
            config.hidden_size, mlp_outputs(f"{name}.mlp", config), mesh
        )
        self.mlp = GatedProduct(f"{name}.mlp", config, mesh, self.selective)
        self._share(self.gate_up, self.mlp.down)

    def enter(self, hidden: Tensor) -> tuple[Heads, tuple[Tensor, ...]]:
        """Heads of the normed stream."""
        query, key, value = self._normed(self.attention_norm, self.query_key_value, hidden)
        return self.attention.heads(query, key, value), ()

    def leave(self, hidden: Tensor, mixed: Tensor, *rest: Tensor) -> Tensor:
        """Adds attention, then the MLP of the normed sum."""
        hidden = hidden + self.attention.output(mixed.flatten(-2))
        if self._chunks(hidden):
            (branch,) = self._normed(self.mlp_norm, self._chunked, hidden)
            return hidden + scatter_sequence(branch, self.tensor)
        gate, up = self._normed(self.mlp_norm, self.gate_up, hidden)
        return hidden + self.mlp(gate, up)


class PostNormBlock(Block):
    """Function, then norm of its output, then add: Olmo 3's and Exaone 4's order."""

    def __init__(
        self,
        index: int,
        config: ModelConfig,
        scheme: AttentionScheme,
        mesh: ParallelMesh,
        kernel: str,
        policy: str,
        norm: str = "torch",
    ) -> None:
        super().__init__(policy, mesh)
        name = f"blocks.{index}"
        self.query_key_value = query_key_value(f"{name}.attention", config, mesh)
        self.attention = Attention(f"{name}.attention", config, scheme, mesh, kernel)
        self.attention_norm = make_norm(config, f"{name}.attention_norm", mesh, norm)
        self.mlp = MLP(f"{name}.mlp", config, mesh, self.selective)
        self.mlp_norm = make_norm(config, f"{name}.mlp_norm", mesh, norm)
        self._share(self.mlp.input, self.mlp.product.down)

    def enter(self, hidden: Tensor) -> tuple[Heads, tuple[Tensor, ...]]:
        """Heads of the stream as it is."""
        return self.attention.heads(*self.query_key_value(hidden)), ()

    def leave(self, hidden: Tensor, mixed: Tensor, *rest: Tensor) -> Tensor:
        """Adds the normed attention, then the normed MLP."""
        hidden = hidden + self.attention_norm(self.attention.output(mixed.flatten(-2)))
        if self._chunks(hidden):
            (branch,) = self.chunked(hidden)  # the norm reads it in backward as well
            return hidden + self.mlp_norm(scatter_sequence(branch, self.tensor))
        return hidden + self.mlp_norm(self.mlp(hidden))


class ParallelBlock(Block):
    """Attention and MLP read one norm and are added together: Cohere's block."""

    def __init__(
        self,
        index: int,
        config: ModelConfig,
        scheme: AttentionScheme,
        mesh: ParallelMesh,
        kernel: str,
        policy: str,
        norm: str = "torch",
    ) -> None:
        super().__init__(policy, mesh)
        name = f"blocks.{index}"
        self.norm = make_norm(config, f"{name}.norm", mesh, norm)
        self.input = ColumnParallelLinear(
            config.hidden_size,
            attention_outputs(f"{name}.attention", config, mesh)
            + mlp_outputs(f"{name}.mlp", config),
            mesh,
        )
        self.attention = Attention(f"{name}.attention", config, scheme, mesh, kernel)
        self.mlp = GatedProduct(f"{name}.mlp", config, mesh, self.selective)
        self._share(self.input, self.mlp.down)

    def enter(self, hidden: Tensor) -> tuple[Heads, tuple[Tensor, ...]]:
        """Heads, gate and up from one product."""
        projection = self._chunked if self._chunks(hidden) else self.input
        query, key, value, *rest = self._normed(self.norm, projection, hidden)
        return self.attention.heads(query, key, value), tuple(rest)

    def folded(self, rest: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """Gate and up multiplied, unless that is computed again: their gradients are then written
        where the input product's backward reads them."""
        return rest if self.selective else (swiglu(*rest), None)

    def leave(self, hidden: Tensor, mixed: Tensor, *rest: Tensor) -> Tensor:
        """Adds attention and MLP, scattered together."""
        branch = self.attention.output(mixed.flatten(-2), reduce=False)
        # The MLP's part is there already where it ran in chunks.
        branch = branch + (rest[0] if len(rest) == 1 else self.mlp(*rest, reduce=False))
        return hidden + scatter_sequence(branch, self.tensor)


BLOCKS = {"pre_norm": PreNormBlock, "post_norm": PostNormBlock, "parallel": ParallelBlock}
