"""Hugging Face's Cohere2 with our weights: the peer that has the same architecture.

Our rotation turns the pairs (i, i + D/2) of a head, Cohere2's the pairs (2i, 2i + 1): rows of the
query and key matrices of rotated layers are reordered on the way.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megahybrid.config.attention import Rope
from megahybrid.config.model import ModelConfig
from megahybrid.model.transformer import Transformer

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


def cohere2(
    config: ModelConfig, longest: int, attention: str, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Cohere2ForCausalLM of this shape, uninitialised. `attention`: sdpa, eager, flex_attention.

    A rotated layer without a window is one whose window is `longest`: Cohere2 rotates exactly its
    sliding layers.
    """
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
    with torch.device(device):
        return Cohere2ForCausalLM(theirs).to(dtype).train()


def take_weights(peer: nn.Module, ours: Transformer) -> None:
    """Set Cohere2's weights to ours."""
    theirs = dict(peer.named_parameters())
    with torch.no_grad():
        for name, tensor in in_their_layout(ours, {n: p for n, p in canonical(ours, grads=False)}):
            theirs[name].copy_(tensor)


def canonical(ours: Transformer, grads: bool) -> Iterator[tuple[str, Tensor]]:
    """Our weights, or their gradients, by canonical name (one process)."""
    for parameter, spec in ours.sharded_parameters().values():
        value = parameter.grad if grads else parameter
        assert value is not None, spec.segments[0].name
        yield from spec.join([(spec, value.detach())]).items()


def in_their_layout(ours: Transformer, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Canonical tensors under Cohere2's names, rows of rotated queries and keys reordered."""
    schemes = ours.config.layer_plan.expand()
    yield "model.embed_tokens.weight", tensors["embedding.weight"]
    yield "model.norm.weight", tensors["final_norm.weight"]
    for index, scheme in enumerate(schemes):
        for mine, their in MATRICES.items():
            tensor = tensors[f"blocks.{index}.{mine}.weight"]
            if mine in ("attention.query", "attention.key") and isinstance(scheme.position, Rope):
                tensor = interleaved(tensor, ours.config.head_dim)
            yield f"model.layers.{index}.{their}.weight", tensor


def interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from the order (0 … D/2 - 1, D/2 … D - 1) to (0, D/2, 1, D/2 + 1, …)."""
    heads = weight.shape[0] // head_dim
    return weight.reshape(heads, 2, head_dim // 2, -1).transpose(1, 2).reshape(weight.shape)


def gradient_errors(ours: Transformer, peer: nn.Module) -> dict[str, float]:
    """‖our gradient - theirs‖ / ‖theirs‖ of each tensor, by Cohere2's names."""
    theirs = dict(peer.named_parameters())
    return {
        name: relative_error(gradient, theirs[name].grad)
        for name, gradient in in_their_layout(ours, dict(canonical(ours, grads=True)))
    }


def relative_error(ours: Tensor, theirs: Tensor | None) -> float:
    """‖a - b‖₂ / ‖b‖₂ in float64."""
    assert theirs is not None
    a, b = ours.detach().double(), theirs.detach().double()
    return ((a - b).norm() / b.norm()).item()
