"""Tensors that wait in host memory from a layer's forward to its backward.

On CUDA they travel on a stream of their own, while the layer that they belong to runs forward, and
back while the layer above it runs backward: that one fetches the next before it begins.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor


class OffloadedTensor:
    """A copy of a tensor in host memory. `before` is the one that will be wanted after it."""

    def __init__(self, tensor: Tensor, before: "OffloadedTensor | None") -> None:
        self.before, self.device = before, tensor.device
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self.arriving: tuple[Tensor, torch.cuda.Event | None] | None = None
        with copy_stream(self.device) as stream:
            self.host.copy_(tensor, non_blocking=True)
            if stream is not None:
                tensor.record_stream(stream)  # its memory is not given away before it is read

    def fetch(self) -> None:
        """Start the copy back, if it is not on its way; nobody waits."""
        if self.arriving is not None:
            return
        room = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device)
        with copy_stream(self.device) as stream:
            room.copy_(self.host, non_blocking=True)
            if stream is not None:
                room.record_stream(stream)
            self.arriving = room, None if stream is None else stream.record_event()

    def back(self) -> Tensor:
        """Return the tensor to whoever reads it on the current stream, and start the next copy."""
        self.fetch()
        assert self.arriving is not None
        (room, there), self.arriving = self.arriving, None
        if self.before is not None:
            self.before.fetch()
        if there is not None:
            torch.cuda.current_stream(self.device).wait_event(there)
        return room


class offload_saved_tensors(torch.autograd.graph.saved_tensors_hooks):
    """Inside this block, what autograd keeps waits in host memory, behind those in `line`."""

    def __init__(self, line: list[OffloadedTensor]) -> None:
        def pack(kept: Tensor) -> Any:
            if not kept.numel():
                return kept
            line.append(OffloadedTensor(kept, line[-1] if line else None))
            return line[-1]

        def unpack(packed: Any) -> Tensor:
            return packed.back() if isinstance(packed, OffloadedTensor) else packed

        super().__init__(pack, unpack)


@contextmanager
def copy_stream(device: torch.device) -> Iterator[torch.cuda.Stream | None]:
    """Inside, copies run beside the computation, behind what was queued before; on a CPU in it."""
    if device.type != "cuda":
        yield None
        return
    stream = _one_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield stream


@cache
def _one_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of both ways: what left last has arrived before it is fetched."""
    return torch.cuda.Stream(device)
