"""torchtitan's Llama 3 (0.2.x) with compiled blocks and FlexAttention, as its trainer sets it up.

Its own model has one mask and rotates every layer. Here each layer gets the mask of its window, and
a layer without position a rotation by no angle: the same products and the same result, and a few
element-wise operations more in a quarter of the layers. The block is the sequential RMSNorm one.
0.3.0 cannot be imported beside torch 2.11 (it wants `DataParallelMeshDims` of a later torch), and
both need triton, which torch's CPU builds come without.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.cohere2 import interleaved
from benchmarks.peers.peer import Peer
from megahybrid.config.attention import Rope
from megahybrid.config.model import ModelConfig

LAYER = {
    "attention.wq": "attention.query",
    "attention.wk": "attention.key",
    "attention.wv": "attention.value",
    "attention.wo": "attention.output",
    "feed_forward.w1": "mlp.gate",
    "feed_forward.w3": "mlp.up",
    "feed_forward.w2": "mlp.down",
    "attention_norm": "attention_norm",
    "ffn_norm": "mlp_norm",
}


def build(
    config: ModelConfig,
    longest: int,
    device: torch.device,
    dtype: torch.dtype,
    flags: Collection[str] = (),
    checkpointing: bool = False,
) -> Peer:
    """Its Transformer of this shape, uninitialised. `flags`: compile (each block and the loss)."""
    from torchtitan.components.loss import cross_entropy_loss

    model = _model(config, longest, device, dtype)
    schemes = config.layer_plan.expand()
    if device.type != "cuda":
        for block in model.layers.values():
            block.attention.inner_attention = DenseMask()
    layers = [
        _prepared(block, checkpointing, "compile" in flags) for block in model.layers.values()
    ]
    unrotated = torch.ones_like(model.freqs_cis)
    turns = [model.freqs_cis if isinstance(s.position, Rope) else unrotated for s in schemes]
    masks: dict[tuple[int, int | None], Any] = {}

    def mask(length: int, window: int | None) -> Any:
        if (length, window) not in masks:
            masks[length, window] = _mask(length, window, device)
        return masks[length, window]

    def hidden(tokens: Tensor) -> Tensor:
        stream = model.tok_embeddings(tokens)
        for layer, turn, scheme in zip(layers, turns, schemes, strict=True):
            stream = layer(stream, turn, mask(tokens.shape[1], scheme.window))
        return model.norm(stream).transpose(0, 1)

    total = torch.compile(cross_entropy_loss) if "compile" in flags else cross_entropy_loss

    def loss(tokens: Tensor) -> Tensor:
        logits = model.output(hidden(tokens)[:-1].transpose(0, 1))
        return total(logits, tokens[:, 1:]) / tokens[:, 1:].numel()

    return Peer(model, layout, model.output.weight, loss, hidden, "sequential block")


def _model(
    config: ModelConfig, longest: int, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    from torchtitan.models.llama3.model.args import RoPEScalingArgs, TransformerModelArgs
    from torchtitan.models.llama3.model.model import Transformer

    schemes = config.layer_plan.expand()
    sizes = TransformerModelArgs(
        dim=config.hidden_size,
        n_layers=len(schemes),
        n_heads=config.num_heads,
        n_kv_heads=config.num_kv_heads,
        vocab_size=config.vocab_size,
        multiple_of=config.intermediate_size,  # it rounds 8/3 of the width up to this
        norm_eps=config.eps,
        rope_theta=next(s.position.theta for s in schemes if isinstance(s.position, Rope)),
        rope_scaling_args=RoPEScalingArgs(scaling_factor=1.0),
        max_seq_len=longest,
        attn_type="flex",
    )
    with torch.device(device):
        model = Transformer(sizes)
    for parameter in model.parameters():  # not its angles, which are complex
        parameter.data = parameter.data.to(dtype)
    model.output.weight = model.tok_embeddings.weight
    return model.train()


def _prepared(block: nn.Module, checkpointing: bool, compiled: bool) -> Callable[..., Tensor]:
    """As its `parallelize_llama` does: recomputation around the block, then the compiler."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    if checkpointing:
        block = checkpoint_wrapper(block, preserve_rng_state=False)
    return torch.compile(block, fullgraph=True) if compiled else block


def _mask(length: int, window: int | None, device: torch.device) -> Any:
    """A block mask as its model makes it; not compiled on a CPU."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torchtitan.models import attention

    rule = (
        attention.get_causal_mask_mod()
        if window is None
        else attention.get_sliding_window_mask_mod(window)
    )
    make = attention.create_attention_mask if device.type == "cuda" else create_block_mask
    return make(rule, 1, None, length, length, device=str(device))


class DenseMask(nn.Module):
    """SDPA in the place of FlexAttention, which has no backward on a CPU: rehearsals only."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, block_mask: Any, enable_gqa: bool = False
    ) -> Tensor:
        """[batch, heads, seq, head_dim] each."""
        from torch.nn.attention.flex_attention import create_mask

        seen = create_mask(block_mask.mask_mod, 1, 1, q.shape[2], k.shape[2], device="cpu")
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=enable_gqa)


def layout(config: ModelConfig, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Canonical tensors under torchtitan's names; it rotates the pairs (2i, 2i + 1)."""
    yield "tok_embeddings.weight", tensors["embedding.weight"]
    yield "norm.weight", tensors["final_norm.weight"]
    for index in range(config.layer_plan.num_layers):
        for their, mine in LAYER.items():
            tensor = tensors[f"blocks.{index}.{mine}.weight"]
            if mine in ("attention.query", "attention.key"):
                tensor = interleaved(tensor, config.head_dim)
            yield f"layers.{index}.{their}.weight", tensor
