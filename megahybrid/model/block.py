"""The ways in which a layer joins attention and MLP to the residual stream.

pre_norm   x += attention(norm(x));  x += mlp(norm(x))
post_norm  x += norm(attention(x));  x += norm(mlp(x))
sandwich   x += norm(attention(norm(x)));  x += norm(mlp(norm(x)))
parallel   u = norm(x);  x += attention(u) + mlp(u), gathered once and scattered once

post_norm is the reordered norm of OLMo 2 (arXiv 2501.00656); the original Post-LN,
norm(x + f(x)), is none of these.

Each is two stretches with the attention kernel between them: `enter`, from the residual stream to
heads, and `leave`, from the attention output back to it. A compiler gets these two, whole.
"""

from collections.abc import Callable
from typing import Any, Literal, assert_never, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from megahybrid.config import chunk_sizes
from megahybrid.config.attention import AttentionScheme
from megahybrid.config.model import ModelConfig
from megahybrid.config.stages import Recompute
from megahybrid.model.attention import Attention, BranchInputs, Heads, Positions
from megahybrid.model.chunked_mlp import ChunkedMLP
from megahybrid.model.compiled import PassThrough, rows_first, traced_whole
from megahybrid.model.context import SequenceContext
from megahybrid.model.core_attention import prepare_queries_keys
from megahybrid.model.layer_parts import LayerParts
from megahybrid.model.mlp import GatedProduct, gated_product
from megahybrid.model.recompute import keeping_products, recomputation, rederived
from megahybrid.parallel.collectives import scatter_sequence
from megahybrid.parallel.mesh import ParallelMesh

Hidden = Float[Tensor, "seq_local batch hidden"]
_GATED = ("gate", "up", "gated")  # the first two, and what is made of them
BlockKind = Literal["pre_norm", "post_norm", "sandwich", "parallel"]


class Block(nn.Module):
    """One layer. `enter` gives heads, and what `leave` needs beside the attention output."""

    attention: Attention
    chunked: ChunkedMLP | None

    def __init__(
        self,
        index: int,
        config: ModelConfig,
        scheme: AttentionScheme,
        mesh: ParallelMesh,
        kernel: str,
        policy: Recompute,
        norm: str = "torch",
    ) -> None:
        super().__init__()
        self.recompute, self.again, self.tensor = recomputation(policy), False, mesh.tensor
        self.residual_scale, self.gated = config.residual_scale, gated_product(config.activation)
        self._regions: tuple[Callable[..., Any], Callable[..., Any]] | None = None
        self.add_parts(LayerParts(index, config, scheme, mesh, kernel, policy, norm))

    def add_parts(self, parts: LayerParts) -> None:
        """Register this block's modules, in the order of its parameters."""
        raise NotImplementedError

    def enter(self, hidden: Tensor) -> tuple[Heads, BranchInputs]:
        """Return the heads of the residual stream, not yet prepared."""
        raise NotImplementedError

    def leave(self, hidden: Tensor, attention_output: Tensor, inputs: BranchInputs) -> Tensor:
        """The residual stream behind this layer."""
        raise NotImplementedError

    def forward(self, hidden: Hidden, context: SequenceContext) -> Hidden:
        """One layer on this rank's part of the sequence."""
        regions = None if self._chunks(hidden) else self._regions
        if regions is None or not torch.is_grad_enabled():
            (q, k, v), inputs = self.enter(hidden)
            out = self.attention(q, k, v, context, inputs.fuse_gate)
            return self.leave(hidden, out, inputs)
        enter, leave = regions
        # Made out here, once per batch: a compiled region sees tensors alone.
        positions = self.attention.positions(context).rows_first()
        heads, inputs, hidden = enter(rows_first(hidden), positions)
        q, k, v = (x.transpose(0, 1) for x in heads)
        gate = None if inputs.fuse_gate is None else inputs.fuse_gate.transpose(0, 1)
        attention_output = self.attention.attended(q, k, v, context, gate)
        return leave(hidden, rows_first(attention_output), inputs).transpose(0, 1)

    def added(self, hidden: Tensor, branch: Tensor) -> Tensor:
        """Return the residual stream with what a function gives added to it, scaled."""
        if self.residual_scale == 1:
            return hidden + branch
        return torch.add(hidden, branch, alpha=self.residual_scale)

    def compile_pieces(self, backend: str) -> None:
        """Have what is local and holds no weight compiled when gradients are wanted: the rotation
        and the gated product. Collectives, products and norms, a kernel each, stay outside."""
        self.attention.compiled_prepare = traced_whole(prepare_queries_keys, backend)
        for module in self.modules():
            if isinstance(module, GatedProduct):
                module.compiled = traced_whole(module.gated, backend)
            elif isinstance(module, ChunkedMLP):
                module.compile_pieces(backend)

    def compile_regions(self, backend: str) -> None:
        """Have `enter` (with the rotation) and `leave` compiled when gradients are wanted.

        The attention kernel stays outside: it is one call, and what it needs of a batch's documents
        is made on the host.
        """
        enter, leave = self._enter_region, self.leave
        if self.recompute.norms:
            enter, leave = keeping_products(enter), keeping_products(leave)
        self._regions = traced_whole(enter, backend), traced_whole(leave, backend)

    def _enter_region(
        self, hidden: Tensor, positions: Positions
    ) -> tuple[Heads, BranchInputs, Tensor]:
        """`enter` and the rotation, all of it [batch, seq, ...]: the order that kernels want heads
        in, and any other layer does without. The stream comes out as well: its gradient is then
        added where the norm's is made."""
        (q, k, v), inputs = self.enter(hidden)
        q, k = self.attention.prepared(q, k, positions)
        return Heads(q, k, v), self.folded(inputs), PassThrough.apply(hidden)

    def folded(self, inputs: BranchInputs) -> BranchInputs:
        """Return the inputs of a compiled `leave`: gate and up multiplied, unless that is computed
        again. Their gradients are then written where the input product's backward reads them."""
        if inputs.gate is None or inputs.up is None or self.recompute.norms:
            return inputs
        # Made anew, not by _replace: torch 2.11 cannot trace that.
        others = {name: getattr(inputs, name) for name in inputs._fields if name not in _GATED}
        return BranchInputs(gated=self.gated(inputs.gate, inputs.up), **others)

    def entered(
        self, names: tuple[str, ...], outputs: tuple[Tensor, ...]
    ) -> tuple[Heads, BranchInputs]:
        """Heads, and the other outputs of the input projection, by their names."""
        named = dict(zip(names, outputs, strict=True))
        heads = self.attention.heads(*(named.pop(name) for name in Heads._fields))
        return heads, BranchInputs(**named)

    def _chunks(self, hidden: Tensor) -> bool:
        """Return whether the MLP of this stream runs in chunks."""
        match self.recompute.chunks:
            case "never":
                return False
            case "always":
                return True
            case "long":
                seq, batch = hidden.shape[:2]
                return seq * batch * self.tensor.size > chunk_sizes.CHUNK_TOKENS
            case other:
                assert_never(other)

    def _chunked(self, normed: Tensor) -> tuple[Tensor, ...]:
        assert self.chunked is not None
        outputs: tuple[Tensor, ...] = self.chunked(normed, needed=not self.again)
        return outputs

    def _normed(
        self, norm: nn.Module, projection: Callable[[Tensor], tuple[Tensor, ...]], hidden: Tensor
    ) -> tuple[Tensor, ...]:
        """projection(norm(hidden)); under selective recompute the norm's output is not kept."""
        normed = norm(hidden)
        if not (self.recompute.norms and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return projection(normed)
        with rederived(normed, norm, hidden.detach()):
            return projection(normed)


class PreNormBlock(Block):
    """Norm, then function, then add: Llama's order."""

    def add_parts(self, parts: LayerParts) -> None:
        """Two norms, each before a projection of its own."""
        self.attention_norm = parts.norm("attention_norm")
        self.query_key_value = parts.input(attention=True)
        self.attention = parts.attention()
        self.mlp_norm = parts.norm("mlp_norm")
        self.gate_up = parts.input(mlp=True)
        self.mlp = parts.gated_product()
        self.chunked = parts.chunked(self.gate_up, self.mlp.down)

    def enter(self, hidden: Tensor) -> tuple[Heads, BranchInputs]:
        """Heads of the normed stream."""
        outputs = self._normed(self.attention_norm, self.query_key_value, hidden)
        return self.entered(self.query_key_value.names, outputs)

    def leave(self, hidden: Tensor, attention_output: Tensor, inputs: BranchInputs) -> Tensor:
        """Adds attention, then the MLP of the normed sum."""
        hidden = self.added(hidden, self.attention.to_hidden(attention_output, inputs))
        if self._chunks(hidden):
            (part,) = self._normed(self.mlp_norm, self._chunked, hidden)
            return self.added(hidden, scatter_sequence(part, self.tensor))
        gate, up = self._normed(self.mlp_norm, self.gate_up, hidden)
        return self.added(hidden, self.mlp(gate, up))


class PostNormBlock(Block):
    """Function, then norm of its output, then add: Olmo 3's and Exaone 4's order."""

    def add_parts(self, parts: LayerParts) -> None:
        """Two norms, each behind what it is of."""
        self.query_key_value = parts.input(attention=True)
        self.attention = parts.attention()
        self.attention_norm = parts.norm("attention_norm")
        self.mlp = parts.mlp()
        self.mlp_norm = parts.norm("mlp_norm")
        self.chunked = parts.chunked(self.mlp.input, self.mlp.product.down)

    def enter(self, hidden: Tensor) -> tuple[Heads, BranchInputs]:
        """Heads of the stream as it is."""
        return self.entered(self.query_key_value.names, self.query_key_value(hidden))

    def leave(self, hidden: Tensor, attention_output: Tensor, inputs: BranchInputs) -> Tensor:
        """Adds the normed attention, then the normed MLP."""
        branch = self.attention.to_hidden(attention_output, inputs)
        hidden = self.added(hidden, self.attention_norm(branch))
        if self._chunks(hidden):
            assert self.chunked is not None
            (part,) = self.chunked(hidden)  # the norm reads it in backward as well
            return self.added(hidden, self.mlp_norm(scatter_sequence(part, self.tensor)))
        return self.added(hidden, self.mlp_norm(self.mlp(hidden)))


class SandwichBlock(Block):
    """A norm before and a norm behind each function: Trinity's and Gemma's order."""

    def add_parts(self, parts: LayerParts) -> None:
        """Four norms, each before what it is read by or behind what it is of."""
        self.attention_norm = parts.norm("attention_norm")
        self.query_key_value = parts.input(attention=True)
        self.attention = parts.attention()
        self.attention_output_norm = parts.norm("attention_output_norm")
        self.mlp_norm = parts.norm("mlp_norm")
        self.gate_up = parts.input(mlp=True)
        self.mlp = parts.gated_product()
        self.mlp_output_norm = parts.norm("mlp_output_norm")
        self.chunked = parts.chunked(self.gate_up, self.mlp.down)

    def enter(self, hidden: Tensor) -> tuple[Heads, BranchInputs]:
        """Heads of the normed stream."""
        outputs = self._normed(self.attention_norm, self.query_key_value, hidden)
        return self.entered(self.query_key_value.names, outputs)

    def leave(self, hidden: Tensor, attention_output: Tensor, inputs: BranchInputs) -> Tensor:
        """Adds the normed attention, then the normed MLP of the normed sum."""
        branch = self.attention.to_hidden(attention_output, inputs)
        hidden = self.added(hidden, self.attention_output_norm(branch))
        if self._chunks(hidden):
            assert self.chunked is not None
            # The norm behind it reads it in backward as well.
            (part,) = self._normed(self.mlp_norm, self.chunked, hidden)
            return self.added(hidden, self.mlp_output_norm(scatter_sequence(part, self.tensor)))
        gate, up = self._normed(self.mlp_norm, self.gate_up, hidden)
        return self.added(hidden, self.mlp_output_norm(self.mlp(gate, up)))


class ParallelBlock(Block):
    """Attention and MLP read one norm and are added together: Cohere's block."""

    def add_parts(self, parts: LayerParts) -> None:
        """One norm, and one projection for both."""
        self.norm = parts.norm("norm")
        self.input = parts.input(attention=True, mlp=True)
        self.attention = parts.attention()
        self.mlp = parts.gated_product()
        self.chunked = parts.chunked(self.input, self.mlp.down)

    def enter(self, hidden: Tensor) -> tuple[Heads, BranchInputs]:
        """Heads, gate and up from one product."""
        if self._chunks(hidden):
            assert self.chunked is not None
            outputs = self._normed(self.norm, self._chunked, hidden)
            return self.entered(self.chunked.names, outputs)
        return self.entered(self.input.names, self._normed(self.norm, self.input, hidden))

    def leave(self, hidden: Tensor, attention_output: Tensor, inputs: BranchInputs) -> Tensor:
        """Adds attention and MLP, scattered together."""
        branch = self.attention.to_hidden(attention_output, inputs, reduce=False)
        return self.added(hidden, scatter_sequence(branch + self._mlp_part(inputs), self.tensor))

    def _mlp_part(self, inputs: BranchInputs) -> Tensor:
        """This rank's part of the MLP's sum, from as far as `enter` got with it."""
        if inputs.mlp is not None:
            return inputs.mlp
        if inputs.gated is not None:
            return self.mlp.down(inputs.gated, reduce=False)
        return self.mlp(inputs.gate, inputs.up, reduce=False)


def block_class(kind: BlockKind) -> type[Block]:
    """Return the block that a run file names."""
    match kind:
        case "pre_norm":
            return PreNormBlock
        case "post_norm":
            return PostNormBlock
        case "sandwich":
            return SandwichBlock
        case "parallel":
            return ParallelBlock
        case other:
            assert_never(other)


BLOCKS: dict[str, type[Block]] = {kind: block_class(kind) for kind in get_args(BlockKind)}
