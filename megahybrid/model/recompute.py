"""What a layer keeps for its backward pass, and what it computes again.

none       everything autograd asks for is kept
selective  norm outputs and the SwiGLU product are dropped and computed again from tensors that are
           kept anyway: no matrix product, no attention and no communication is repeated
chunked    as selective, and the MLP runs chunk by chunk: gate and up are computed again as well
full       only the layer's input is kept (arXiv 1604.06174); a long sequence's MLP runs in chunks
offload    as full, and that input waits in host memory (model/activation_offload.py)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, assert_never

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from megahybrid.config.stages import Recompute
from megahybrid.model.activation_offload import offload_saved_tensors


@dataclass(frozen=True)
class Recomputation:
    """The parts of a layer that a policy drops in forward and computes again."""

    norms: bool = False  # outputs of norms and the MLP's gated product
    layer: bool = False  # everything but the layer's input
    offload: bool = False  # that input waits in host memory
    chunks: Literal["never", "long", "always"] = "never"  # which sequences an MLP cuts


def recomputation(policy: Recompute) -> Recomputation:
    """Return what a policy of the run file means."""
    match policy:
        case "none":
            return Recomputation()
        case "selective":
            return Recomputation(norms=True)
        case "chunked":
            return Recomputation(norms=True, chunks="always")
        case "full":
            return Recomputation(layer=True, chunks="long")
        case "offload":
            return Recomputation(layer=True, offload=True, chunks="long")
        case other:
            assert_never(other)


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


def _keeps_products(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator in PRODUCTS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def keeping_products(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under selective recompute as a compiler knows it: outputs of matrix products are
    kept, whatever lies between them is computed again."""
    contexts: Any = partial(create_selective_checkpoint_contexts, _keeps_products)
    contexts.cache_hash = "products are kept"  # torch keeps no program of a policy without a name

    def run(*args: Any) -> Any:
        return checkpoint(
            function,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=contexts,
        )

    return run


def run_block(
    block: Callable[..., Tensor], hidden: Tensor, context: Any, policy: Recompute
) -> Tensor:
    """Return `block(hidden, context)`, under full recompute where the policy says so.
    `context.offloaded` is the line of inputs that wait in host memory."""
    what = recomputation(policy)
    if not what.layer or not torch.is_grad_enabled():
        return block(hidden, context)
    # The checkpoint keeps its input alone; what it keeps inside are its own hooks' affair.
    keeping = offload_saved_tensors(context.offloaded) if what.offload else nullcontext()
    with keeping:
        # The blocks draw nothing at random, so no generator state needs to be put back.
        return checkpoint(
            block,
            hidden,
            context,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), _again(block)),
        )


@contextmanager
def _again(block: Any) -> Iterator[None]:
    """Inside, `block.again`: it runs for its backward alone, and nobody reads what it gives."""
    block.again = True
    try:
        yield
    finally:
        block.again = False
