"""What the card reaches without us: a copy, the step's own products, and the loss in parts."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_call.setting import Setting
from benchmarks.timing import timed
from megahybrid.config.model import ModelConfig
from megahybrid.parallel import vocab
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.parallel.vocab import VocabParallelHead

REPEATS = 7
# Tokens of one micro-batch, and of one part of the loss's logits.
TOKENS = 32768
PARTS = (256, 512, 1024)


def copy(setting: Setting) -> dict[str, Any]:
    """Bytes a second, read and written together."""
    size = 2**20 if setting.rehearsal else 2**31
    source = torch.ones(size, dtype=torch.bfloat16, device=setting.device)
    target = torch.empty_like(source)
    seconds = least(lambda: target.copy_(source), setting)
    return {"ceiling": "copy", "bytes_per_second": 2 * source.nbytes / seconds}


def products(setting: Setting) -> Iterator[dict[str, Any]]:
    """The seven kinds of product of one layer's step and of the head, FLOP/s of each."""
    config = setting.hybrid()
    tokens = 64 if setting.rehearsal else TOKENS
    for name, rows, inner, columns in shapes(config, tokens):
        a = torch.randn(rows, inner, device=setting.device, dtype=setting.dtype)
        b = torch.randn(inner, columns, device=setting.device, dtype=setting.dtype)
        out = torch.empty(rows, columns, device=setting.device, dtype=setting.dtype)
        seconds = least(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), setting)
        yield {
            "ceiling": f"product {name}",
            "size": [rows, inner, columns],
            "flops_per_second": 2 * rows * inner * columns / seconds,
        }


def shapes(config: ModelConfig, tokens: int) -> list[tuple[str, int, int, int]]:
    """(name, rows, inner, columns): the fused input product and the fused output product of the
    parallel block, forward, by the input and by the weight; and the head's."""
    hidden, attention = config.hidden_size, config.num_heads * config.head_dim
    wide = attention + 2 * config.num_kv_heads * config.head_dim + 2 * config.intermediate_size
    back = attention + config.intermediate_size
    return [
        ("in", tokens, hidden, wide),
        ("in, by its input", tokens, wide, hidden),
        ("in, by its weight", wide, tokens, hidden),
        ("out", tokens, back, hidden),
        ("out, by its input", tokens, hidden, back),
        ("out, by its weight", hidden, tokens, back),
        ("head", min(tokens, 2048), hidden, config.vocab_size),
    ]


def loss_parts(setting: Setting) -> Iterator[dict[str, Any]]:
    """Seconds and memory of the whole loss, forward and backward, with its logits in parts of
    several sizes: a part reads the head's weight once."""
    config = setting.hybrid()
    tokens = 64 if setting.rehearsal else 8192
    hidden = torch.randn(
        tokens, 1, config.hidden_size, device=setting.device, dtype=setting.dtype
    ).requires_grad_()
    head = VocabParallelHead(
        config.vocab_size, config.hidden_size, "lm_head.weight", ParallelMesh.single(setting.device)
    ).to(setting.dtype)
    torch.nn.init.normal_(head.weight, std=0.02)
    targets = torch.randint(config.vocab_size, (tokens, 1), device=setting.device)
    chunk = vocab.chunk_size(config.vocab_size, hidden)

    def step() -> tuple[Tensor, ...]:
        total, _ = head(hidden, targets.t(), 1.0)
        return torch.autograd.grad(total, (hidden, head.weight))

    before = vocab.LOSS_PARTS
    try:
        for size in PARTS:
            vocab.LOSS_PARTS = max(1, chunk // size)
            setting.free()
            seconds = least(step, setting)
            yield {
                "ceiling": f"loss in parts of {size}",
                "seconds_per_token": seconds / tokens,
                "peak_gib": setting.peak_gib(),
            }
    finally:
        vocab.LOSS_PARTS = before


def least(run: Callable[[], object], setting: Setting) -> float:
    """The least seconds of a few runs after two."""
    for _ in range(2):
        run()
    return min(timed(run, setting.device)[0] for _ in range(REPEATS))
