"""A rank's share in host memory, so that training may change the original while it is written."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megahybrid.checkpoint.fragments import Fragment

# Fragments of a device come through locked memory, piece by piece. torch's allocator of locked
# memory takes the next power of two: locking a whole share of 8B parameters on one rank, 96 GB,
# would take 128 GiB. Two pieces, so that one arrives while the other is emptied.
CHUNK_ELEMENTS = 2**24  # elements of fp32: 64 MiB, a power of two
CHUNKS = 2


class HostCopy:
    """One buffer per rank, made at the first copy and used again by every later one.

    Touching new memory costs as much as the copy itself.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0)
        self._ring: _PinnedRing | None = None

    def take(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """Return the same fragments, held here. What an earlier call returned is overwritten."""
        parts = list(fragments)
        sizes = [part.flat[1] - part.flat[0] for part in parts]
        tensors = [torch.as_tensor(part.data) for part in parts]
        if self._buffer.numel() < sum(sizes):
            self._buffer = torch.empty(sum(sizes), dtype=torch.float32)
        copies = []
        for part, size, tensor, target in zip(
            parts, sizes, tensors, self._targets(sizes), strict=True
        ):
            if tensor.dtype != torch.float32 or tensor.shape != (size,):
                raise TypeError(
                    f"{part.tensor}: {tensor.dtype} {list(tensor.shape)}, not flat fp32"
                )
            if tensor.device.type == "cpu":
                _copy(tensor, target)
            else:
                if self._ring is None:
                    self._ring = _PinnedRing(tensor.device)
                self._ring.start_copy(tensor.detach(), target)
            copies.append(replace(part, data=target.numpy()))
        if self._ring is not None:
            self._ring.empty()
        return copies

    def _targets(self, sizes: list[int]) -> Iterator[Tensor]:
        at = 0
        for size in sizes:
            yield self._buffer[at : at + size]
            at += size


def _copy(source: Tensor, target: Tensor) -> None:
    # One thread: torch's would wait for one another on a machine that computes.
    np.copyto(target.numpy(), source.detach().numpy())


class _PinnedRing:
    """Buffers of pinned memory between a device and the host copy."""

    def __init__(
        self, device: torch.device, chunk: int = CHUNK_ELEMENTS, chunks: int = CHUNKS
    ) -> None:
        cuda = device.type == "cuda"
        self._buffers = [
            torch.empty(chunk, dtype=torch.float32, pin_memory=cuda) for _ in range(chunks)
        ]
        self._arrived = [torch.cuda.Event() if cuda else None for _ in range(chunks)]
        self._under_way: dict[int, Tensor] = {}  # by room: where its content belongs
        self._next = 0

    @property
    def bytes(self) -> int:
        """Return how much memory is locked."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def start_copy(self, tensor: Tensor, target: Tensor) -> None:
        """Begin to copy `tensor`, flat, to `target`; it is there after `empty`."""
        chunk = len(self._buffers[0])
        for source, part in zip(tensor.split(chunk), target.split(chunk), strict=True):
            slot = self._next
            self._next = (slot + 1) % len(self._buffers)
            self._hand_on(slot)
            self._buffers[slot][: len(source)].copy_(source, non_blocking=True)
            event = self._arrived[slot]
            if event is not None:
                event.record()
            self._under_way[slot] = part

    def empty(self) -> None:
        """Return when everything has come to its place."""
        for slot in range(len(self._buffers)):
            self._hand_on(slot)

    def _hand_on(self, slot: int) -> None:
        part = self._under_way.pop(slot, None)
        if part is None:
            return
        event = self._arrived[slot]
        if event is not None:
            event.synchronize()
        _copy(self._buffers[slot][: len(part)], part)
