"""AdamW whose moments wait in host memory and visit the device a piece at a time.

DeepSpeed's own off-loading sums micro-batches in the weights' precision and updates with a compiled
AdamW of its own; here gradients, masters and arithmetic stay where they are, so that every bit of a
run is what it is without. While one piece is updated, the next arrives and the last one leaves.
"""

import contextlib
import math
import mmap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megahybrid.config.chunk_sizes import OFFLOAD_PIECE, OFFLOAD_ROOMS
from megahybrid.train.engine.adamw import MOMENTS, ObservedAdamW


class OffloadedAdamW(ObservedAdamW):
    """`ObservedAdamW` for which a device holds a few pieces of the moments instead of all."""

    piece = OFFLOAD_PIECE  # elements
    _visits: "_Visits | None" = None

    def _zeros(self, flat: Tensor) -> Tensor:
        if flat.device.type == "cuda":
            return locked_zeros(flat.shape, flat.dtype)
        return torch.zeros(flat.shape, dtype=flat.dtype, device="cpu")

    def _update(self, closure: Any) -> Any:
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    self._update_pieces(flat, group)
        if self._visits is not None:
            self._visits.finish()

    def _update_pieces(self, flat: Tensor, group: dict[str, Any]) -> None:
        state = self.create_state(flat)
        weight, gradient = flat.detach().view(-1), flat.grad.view(-1)  # type: ignore[union-attr]
        moments = [state[name].view(-1) for name in MOMENTS]
        visits = self._rooms(weight)
        for start in range(0, weight.numel(), self.piece):
            here = slice(start, start + self.piece)
            with visits.visit([moment[here] for moment in moments]) as rooms:
                adamw(
                    [weight[here]],
                    [gradient[here]],
                    [rooms[0]],
                    [rooms[1]],
                    [],
                    [state["step"].clone()],
                    foreach=False,
                    fused=group["fused"],
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
        state["step"] += 1

    def _rooms(self, weight: Tensor) -> "_Visits":
        """Rooms for pieces of `weight`: those there are, unless they are too small for it."""
        size = min(self.piece, weight.numel())
        if self._visits is None or self._visits.rooms.shape[-1] < size:
            if self._visits is not None:
                self._visits.finish()
            self._visits = _Visits(size, weight)
        return self._visits


class _Locked(mmap.mmap):
    """Host memory that is let go of when its last tensor is."""

    address: int | None = None  # where it is locked

    def __del__(self) -> None:
        if self.address is not None:
            with contextlib.suppress(Exception):  # the process may be ending
                torch.cuda.cudart().cudaHostUnregister(self.address)


def locked_zeros(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """In host memory that copies need not wait for, of as many bytes: torch's own allocator takes
    the next power of two, up to twice as much, and touches it with one thread."""
    size = max(1, math.prod(shape)) * dtype.itemsize
    memory = _Locked(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)  # a write beside a child would move what a device reads
    zeros = torch.frombuffer(memory, dtype=dtype)[: math.prod(shape)].view(shape).zero_()
    if int(torch.cuda.cudart().cudaHostRegister(zeros.data_ptr(), size, 0)) != 0:
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device="cuda")  # the next kernel is told of the error: this one
        return torch.zeros(shape, dtype=dtype, pin_memory=True)
    memory.address = zeros.data_ptr()
    return zeros


class _Visits:
    """Room for some pieces on a device, and the streams on which they come and go."""

    def __init__(self, piece: int, like: Tensor) -> None:
        self.rooms = like.new_empty(OFFLOAD_ROOMS, len(MOMENTS), piece)
        self.number = 0
        self.device = like.device
        self.cuda = like.device.type == "cuda"
        if self.cuda:
            self.arrive, self.leave = (torch.cuda.Stream(like.device) for _ in range(2))
            self.left = [torch.cuda.Event() for _ in range(OFFLOAD_ROOMS)]
            # The memory of the rooms may still be in use by what had it before.
            self.arrive.wait_stream(torch.cuda.current_stream(like.device))

    @contextlib.contextmanager
    def visit(self, waiting: list[Tensor]) -> Iterator[list[Tensor]]:
        """The moments on the device, which go back to `waiting` when they have been used."""
        slot = self.number % OFFLOAD_ROOMS
        self.number += 1
        rooms = [room[: len(host)] for room, host in zip(self.rooms[slot], waiting, strict=True)]
        with self._on("arrive"):
            if self.cuda:
                self.arrive.wait_event(self.left[slot])  # whoever was in this room before
            for room, host in zip(rooms, waiting, strict=True):
                room.copy_(host, non_blocking=True)
        if self.cuda:
            torch.cuda.current_stream(self.device).wait_stream(self.arrive)
        yield rooms
        if self.cuda:
            self.leave.wait_stream(torch.cuda.current_stream(self.device))
        with self._on("leave"):
            for room, host in zip(rooms, waiting, strict=True):
                host.copy_(room, non_blocking=True)
            if self.cuda:
                self.left[slot].record()

    def _on(self, name: str) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(getattr(self, name)) if self.cuda else contextlib.nullcontext()

    def finish(self) -> None:
        """Whoever reads a result of this stream finds the moments in host memory; so do those who
        arrive from now on."""
        if self.cuda:
            torch.cuda.current_stream(self.device).wait_stream(self.leave)
            self.arrive.wait_stream(self.leave)
