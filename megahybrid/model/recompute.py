"""What a layer keeps for its backward pass, and what it computes again.

none       everything autograd asks for is kept
selective  norm outputs and the SwiGLU product are dropped and computed again from tensors that are
           kept anyway: no matrix product, no attention and no communication is repeated
chunked    as selective, and the MLP runs chunk by chunk: gate and up are computed again as well
full       only the layer's input is kept (arXiv 1604.06174); a long sequence's MLP runs in chunks
offload    as full, and that input waits in host memory
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


class rederived(torch.autograd.graph.saved_tensors_hooks):
    """Inside this block, autograd keeps a recipe wherever it would keep `tensor`.

    `derive(*sources)` must give the same values again. It runs without gradients, while the reader
    of `tensor` runs backward, so it may use only what is whole at that time.
    """

    def __init__(self, tensor: Tensor, derive: Callable[..., Tensor], *sources: Tensor) -> None:
        # Autograd keeps both hooks as long as the graph: what they close over is not freed.
        address, count = tensor.data_ptr(), tensor.numel()

        def pack(kept: Tensor) -> Any:
            # Linear layers may keep a flattened view of the same memory.
            same = kept.data_ptr() == address and kept.numel() == count
            return kept.shape if same and count and kept.is_contiguous() else kept

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            with torch.no_grad():
                return derive(*sources).view(packed)

        super().__init__(pack, unpack)


def keeping_products(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under selective recompute as a compiler knows it: outputs of matrix products are
    kept, whatever lies between them is computed again."""

    def policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = operator in PRODUCTS
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def run(*args: Any) -> Any:
        return checkpoint(
            function,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=partial(create_selective_checkpoint_contexts, policy),
        )

    return run


def run_block(block: Callable[..., Tensor], hidden: Tensor, context: Any, policy: str) -> Tensor:
    """`block(hidden, context)`, under full recompute where the policy says so."""
    if policy == "full" and torch.is_grad_enabled():
        # The blocks draw nothing at random, so no generator state needs to be put back.
        return checkpoint(
            block,
            hidden,
            context,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), _again(block)),
        )
    if policy == "offload" and torch.is_grad_enabled():
        return _Offloaded.apply(hidden, block, context)
    return block(hidden, context)


@contextmanager
def _again(block: Any) -> Iterator[None]:
    """Inside, `block.again`: it runs for its backward alone, and nobody reads what it gives."""
    block.again = True
    try:
        yield
    finally:
        block.again = False


class _Offloaded(torch.autograd.Function):
    """A block whose input waits in host memory, and which runs again in backward.

    Copies go along the computation's own stream: at 128k tokens of 2,048 values they are 10 ms
    beside a layer's 300.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, block: Callable[..., Tensor], context: Any) -> Tensor:
        ctx.block, ctx.context, ctx.device = block, context, hidden.device
        ctx.host = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=hidden.is_cuda)
        ctx.host.copy_(hidden, non_blocking=True)
        with torch.no_grad():
            return block(hidden, context)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        hidden = ctx.host.to(ctx.device, non_blocking=True).detach().requires_grad_()
        ctx.host = None
        with torch.enable_grad(), _again(ctx.block):
            out = ctx.block(hidden, ctx.context)
        torch.autograd.backward(out, grads[0])
        return hidden.grad, None, None
