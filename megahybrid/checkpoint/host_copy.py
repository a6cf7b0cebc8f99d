"""A rank's share in host memory, so that training may change the original while it is written."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megahybrid.checkpoint.fragments import Fragment


class HostCopy:
    """One buffer per rank, made at the first copy and used again by every later one: touching new
    memory costs as much as the copy itself. Beside an accelerator it is pinned."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def take(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """The same fragments, held here. What an earlier call returned is overwritten."""
        parts = list(fragments)
        sizes = [part.flat[1] - part.flat[0] for part in parts]
        tensors = [torch.as_tensor(part.data) for part in parts]
        on_device = any(tensor.device.type != "cpu" for tensor in tensors)
        if self._buffer.numel() < sum(sizes):
            self._buffer = torch.empty(sum(sizes), dtype=torch.float32, pin_memory=on_device)
        copies = []
        for part, size, tensor, place in zip(
            parts, sizes, tensors, self._places(sizes), strict=True
        ):
            if tensor.dtype != torch.float32 or tensor.shape != (size,):
                raise TypeError(
                    f"{part.tensor}: {tensor.dtype} {list(tensor.shape)}, not flat fp32"
                )
            if tensor.device.type == "cpu":
                # One thread: torch's would wait for one another on a machine that computes.
                np.copyto(place.numpy(), tensor.detach().numpy())
            else:
                place.copy_(tensor.detach(), non_blocking=True)
            copies.append(replace(part, data=place.numpy()))
        if on_device:
            torch.cuda.synchronize()
        return copies

    def _places(self, sizes: list[int]) -> Iterator[Tensor]:
        at = 0
        for size in sizes:
            yield self._buffer[at : at + size]
            at += size
