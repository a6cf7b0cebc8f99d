"""Hugging Face's Cohere2: the peer that has the same architecture.

Our rotation turns the pairs (i, i + D/2) of a head, Cohere2's the pairs (2i, 2i + 1): rows of the
query and key matrices of rotated layers are reordered on the way.
"""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.peer import Peer
from megahybrid.config.attention import Rope
from megahybrid.config.model import ModelConfig

MATRICES = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "norm": "input_layernorm",
}


def build(
    config: ModelConfig,
    longest: int,
    device: torch.device,
    dtype: torch.dtype,
    attention: str = "sdpa",
    flags: Collection[str] = (),
    checkpointing: bool = False,
) -> Peer:
    """Cohere2ForCausalLM of this shape, uninitialised.

    `attention`: sdpa, eager, flex_attention. `flags`: compile; chunked (its loss is not compiled
    with it, as it will not be used); liger (Liger's SwiGLU and its loss without logits).
    """
    model = _model(config, longest, attention).to(device=device, dtype=dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def hidden(tokens: Tensor) -> Tensor:
        return model.model(input_ids=tokens).last_hidden_state.transpose(0, 1)

    peer = Peer(
        model,
        layout,
        model.model.embed_tokens.weight,
        lambda tokens: model(input_ids=tokens, labels=tokens).loss,  # it shifts by itself
        hidden,
    )
    if "liger" in flags:
        peer = with_liger(peer, config)
    if "compile" in flags:
        (model.model if {"chunked", "liger"} & set(flags) else model).compile()
    return peer


def _model(config: ModelConfig, longest: int, attention: str) -> nn.Module:
    """A rotated layer without a window is one whose window is `longest`: Cohere2 rotates exactly
    its sliding layers."""
    from transformers import Cohere2Config, Cohere2ForCausalLM

    schemes = config.layer_plan.expand()
    rotated = [scheme for scheme in schemes if isinstance(scheme.position, Rope)]
    theirs = Cohere2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=len(schemes),
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=longest,
        layer_norm_eps=config.eps,
        logit_scale=config.logit_scale,
        tie_word_embeddings=config.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": rotated[0].position.theta},
        sliding_window=rotated[0].window or longest,
        layer_types=[
            "sliding_attention" if isinstance(scheme.position, Rope) else "full_attention"
            for scheme in schemes
        ],
        use_cache=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=attention,
    )
    return Cohere2ForCausalLM(theirs)


def layout(config: ModelConfig, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Canonical tensors under Cohere2's names, rows of rotated queries and keys reordered."""
    yield "model.embed_tokens.weight", tensors["embedding.weight"]
    yield "model.norm.weight", tensors["final_norm.weight"]
    for index, scheme in enumerate(config.layer_plan.expand()):
        for mine, their in MATRICES.items():
            tensor = tensors[f"blocks.{index}.{mine}.weight"]
            if mine in ("attention.query", "attention.key") and isinstance(scheme.position, Rope):
                tensor = interleaved(tensor, config.head_dim)
            yield f"model.layers.{index}.{their}.weight", tensor


def interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from the order (0 … D/2 - 1, D/2 … D - 1) to (0, D/2, 1, D/2 + 1, …)."""
    heads = weight.shape[0] // head_dim
    return weight.reshape(heads, 2, head_dim // 2, -1).transpose(1, 2).reshape(weight.shape)


def with_liger(peer: Peer, config: ModelConfig) -> Peer:
    """Liger-Kernel knows no Cohere2: its SwiGLU in every MLP, and its loss, which makes the logits
    a piece at a time. Its rotation has other pairs, its LayerNorm a bias. CUDA only."""
    from liger_kernel.ops import LigerSiLUMulFunction
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    def swiglu(mlp: Any) -> Any:
        return lambda x: mlp.down_proj(
            LigerSiLUMulFunction.apply(mlp.gate_proj(x), mlp.up_proj(x), 1.0, 1.0)
        )

    for layer in peer.module.model.layers:  # type: ignore[union-attr]
        layer.mlp.forward = swiglu(layer.mlp)
    cross_entropy = LigerFusedLinearCrossEntropyLoss()

    def loss(tokens: Tensor) -> Tensor:
        kept = peer.hidden(tokens)[:-1].transpose(0, 1).flatten(0, 1) * config.logit_scale
        return cross_entropy(peer.embedding, kept, tokens[:, 1:].flatten())

    return Peer(
        peer.module, peer.layout, peer.embedding, loss, peer.hidden, "Liger's SwiGLU and loss"
    )
