"""megatron-core's GPTModel: its local spec as it comes, or with our attention kernels in it.

Its window and NoPE plan are those of the hybrid, and the block is the sequential RMSNorm one (it
has no parallel block). Transformer Engine, which its other spec wants, has no wheel.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks.peers.peer import Peer
from megahybrid.config.attention import Rope
from megahybrid.config.model import ModelConfig
from megahybrid.model.kernels import AttentionSpec, attend

LAYER = {
    "self_attention.linear_qkv": ("attention.query", "attention.key", "attention.value"),
    "self_attention.linear_proj": ("attention.output",),
    "mlp.linear_fc1": ("mlp.gate", "mlp.up"),
    "mlp.linear_fc2": ("mlp.down",),
    "input_layernorm": ("attention_norm",),
    "pre_mlp_layernorm": ("mlp_norm",),
}


def build(
    config: ModelConfig,
    longest: int,
    device: torch.device,
    dtype: torch.dtype,
    flags: Collection[str] = (),
    checkpointing: bool = False,
    kernels: Sequence[str] | None = None,
) -> Peer:
    """GPTModel of this shape, uninitialised; a world of one is joined already.

    `flags`: patched (our `kernels`, one name a layer, in the place of its DotProductAttention).
    Recomputation is that of the scores alone where these are held, else of whole layers.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    patched = "patched" in flags
    settings = _settings(config, device, dtype, checkpointing, patched)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    schemes = config.layer_plan.expand()
    theta = next(s.position.theta for s in schemes if isinstance(s.position, Rope))
    _join()
    with _here(device):
        model = GPTModel(
            settings,
            spec,
            config.vocab_size,
            longest,
            share_embeddings_and_output_weights=True,
            position_embedding_type="rope",
            rotary_base=theta,
        )
    model.to(device=device, dtype=dtype).train()
    if patched:
        names = kernels or ["auto"] * len(schemes)
        for layer, scheme, name in zip(model.decoder.layers, schemes, names, strict=True):
            layer.self_attention.core_attention = Attention(scheme.window, config.head_dim, name)

    def run(tokens: Tensor, labels: Tensor | None) -> Tensor:
        model.post_process = labels is not None  # it returns hidden states otherwise
        places = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        with _here(device):
            return model(tokens, places, None, labels=labels)

    def loss(tokens: Tensor) -> Tensor:
        return run(tokens, tokens.roll(-1, 1))[:, :-1].mean()

    weight = model.embedding.word_embeddings.weight
    how = "sequential block" + (", our attention kernels" if patched else ", S × S scores")
    return Peer(model, layout, weight, loss, lambda tokens: run(tokens, None), how)


def _settings(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, recompute: bool, patched: bool
) -> Any:
    """Its TransformerConfig: every fusion that a local spec can have where there is a GPU."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    on_gpu = device.type == "cuda"
    schemes = config.layer_plan.expand()
    window = next((scheme.window for scheme in schemes if scheme.window is not None), None)
    whole: dict[str, Any] = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    scores: dict[str, Any] = {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn"],
    }
    return TransformerConfig(
        num_layers=len(schemes),
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads,
        kv_channels=config.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=config.eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        # Its window counts the keys to the left of a query, ours the query too.
        window_size=None if window is None else (window - 1, 0),
        window_attn_skip_freq=[int(scheme.window is not None) for scheme in schemes],
        no_rope_freq=[int(not isinstance(scheme.position, Rope)) for scheme in schemes],
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        cross_entropy_loss_fusion=on_gpu,
        use_cpu_initialization=not on_gpu,
        perform_initialization=False,
        **((whole if patched else scores) if recompute else {}),
    )


class Attention(nn.Module):
    """Our kernel in the place of DotProductAttention, which holds all scores."""

    def __init__(self, window: int | None, head_dim: int, kernel: str) -> None:
        super().__init__()
        self.window, self.scale, self.kernel = window, head_dim**-0.5, kernel

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """[seq, batch, heads, head_dim] to [seq, batch, heads · head_dim]."""
        spec = AttentionSpec(window=self.window, scale=self.scale)
        return attend(query, key, value, spec, self.kernel).flatten(2)


def layout(config: ModelConfig, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Canonical tensors under megatron's names: a query group's queries stand before its key and
    its value; gate stands before up."""
    yield "embedding.word_embeddings.weight", tensors["embedding.weight"]
    yield "decoder.final_layernorm.weight", tensors["final_norm.weight"]
    groups, width = config.num_kv_heads, config.hidden_size
    for index in range(config.layer_plan.num_layers):
        for their, mine in LAYER.items():
            parts = [tensors[f"blocks.{index}.{name}.weight"] for name in mine]
            if their == "self_attention.linear_qkv":
                grouped = [part.reshape(groups, -1, width) for part in parts]
                parts = [torch.cat(grouped, 1).reshape(-1, width)]
            yield f"decoder.layers.{index}.{their}.weight", torch.cat(parts)


def _join() -> None:
    """Its process groups and its random state, once a process."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    # The tracker for inference draws nothing; there is no dropout here.
    initialize_rng_tracker(inference_rng_tracker=True)


class _OnHost(TorchFunctionMode):
    """Makes what it makes on the host where its code names CUDA."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@contextlib.contextmanager
def _here(device: torch.device) -> Iterator[None]:
    """megatron-core asks CUDA for its device wherever it is; on a CPU it is told the host."""
    if device.type == "cuda":
        yield
        return
    host = torch.device("cpu")
    with mock.patch.object(torch.cuda, "current_device", lambda: host), _OnHost():
        yield
