"""Other libraries' models with our weights, by the names of `--peers`.

A name is a model and its settings, joined by `+`: `sdpa`, `eager` and `flex_attention` are Hugging
Face's Cohere2 with that attention; `megatron` and `torchtitan` the other two. Settings: `compile`;
`chunked`, our loss lent to it; `liger` (Cohere2); `patched`, our attention kernels (megatron).
"""

from collections.abc import Sequence

from benchmarks.peers import cohere2, megatron, titan
from benchmarks.peers.peer import Peer, take_weights
from megahybrid.config.model import ModelConfig
from megahybrid.model.transformer import Transformer

SEQUENTIAL = ("megatron", "torchtitan")


def peer_config(name: str, config: ModelConfig) -> ModelConfig:
    """`config`, or for a peer without a parallel block the same with the sequential RMSNorm one."""
    if name.split("+")[0] in SEQUENTIAL:
        return config.model_copy(update={"block": "pre_norm", "norm": "rms"})
    return config


def peer_of(
    name: str,
    ours: Transformer,
    longest: int,
    checkpointing: bool = False,
    kernels: Sequence[str] | None = None,
) -> Peer:
    """The peer with our weights, device and dtype; `ours` is a model of its `peer_config`."""
    model, *flags = name.split("+")
    weight = ours.embedding.weight
    where = (ours.config, longest, weight.device, weight.dtype)
    if model == "megatron":
        peer = megatron.build(*where, flags, checkpointing, kernels)
    elif model == "torchtitan":
        peer = titan.build(*where, flags, checkpointing)
    else:
        peer = cohere2.build(*where, model, flags, checkpointing)
    return take_weights(peer, ours)


def title(name: str) -> str:
    """'transformers sdpa+compile', 'megatron patched', 'torchtitan compile'."""
    model, _, settings = name.partition("+")
    if model == "megatron":
        return f"megatron-core {settings or 'local'}"
    return f"torchtitan {settings}".strip() if model == "torchtitan" else f"transformers {name}"
