"""Gradients of micro-batches, summed in fp32 where ZeRO leaves them whole: stage 1 in bf16.

DeepSpeed makes an fp32 copy of each gradient to add it, and sets the sums to zero twice a step: 26
bytes a parameter for the first micro-batch, 26 with the bf16 gradient's own sum for each that
follows. Here the first is copied to its place and others are added as they are: 6 bytes and 10, and
the same bits. It reduces the sums over the data axis when the last backward pass is over, rounded
to bf16 unless told otherwise; here they travel as they are, in pieces while that pass runs. To be
imported after `prepare_deepspeed`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor

from megahybrid.parallel.collectives import Pending, start_all_reduce
from megahybrid.parallel.mesh import Axis

PIECE = 2**26  # elements that are reduced at a time: large enough for a network's best


class PatchedBf16Optimizer(BF16_Optimizer):
    """DeepSpeed's optimizer with our sums of gradients; `patch_gradient_sums` makes one into it.

    Its methods have DeepSpeed's names, some of them private (pyproject.toml pins the version), and
    are called as each backward pass begins, as each gradient is complete, at the end of the pass,
    and twice after an update.
    """

    data: Axis
    overlaps: bool
    pieces: list[tuple[Tensor, int]]  # in the order they are reduced, and how many gradients each
    piece_of: list[list[int]]  # by group and parameter
    boundary = False  # whether this micro-batch is the step's last
    missing: list[int]  # gradients of each piece
    reducing: list[Pending]

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self.boundary = is_boundary

    def backward_prologue(self) -> None:
        super().backward_prologue()
        self.missing, self.reducing = [count for _, count in self.pieces], []

    @torch.no_grad()
    def _update_hp_grad(
        self, lp: Any, group_idx: int, param_idx: int, clear_lp_grads: bool
    ) -> None:
        total: Tensor = self.fp32_groups_gradients[group_idx][param_idx]
        begun: list[bool] = self.fp32_groups_has_gradients[group_idx]
        gradient = lp.grad.view(total.shape)
        if begun[param_idx]:
            total.add_(gradient)
        else:
            total.copy_(gradient)
        begun[param_idx] = True
        self.missing[self.piece_of[group_idx][param_idx]] -= 1
        if self.boundary and self.overlaps:
            self._reduce(whatever=False)

    @torch.no_grad()
    def update_hp_grads(self, clear_lp_grads: bool = False) -> None:
        for group, begun in enumerate(self.fp32_groups_has_gradients):
            for index, there in enumerate(begun):
                if not there:  # what stands there is of an earlier step
                    self.fp32_groups_gradients[group][index].zero_()

    def _reduce(self, whatever: bool) -> None:
        """Sends for the sums of pieces, always in the same order: as far as all of their gradients
        are complete, or all that is left."""
        while len(self.reducing) < len(self.pieces):
            piece = len(self.reducing)
            if self.missing[piece] and not whatever:
                return
            self.reducing.append(start_all_reduce(self.pieces[piece][0], self.data))

    @torch.no_grad()
    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """The mean over the data axis, at the end of a step's last backward pass."""
        if self.data.size == 1:
            return
        self._reduce(whatever=True)
        for pending in self.reducing:
            pending.wait().mul_(1.0 / self.data.size)

    def clear_hp_grads(self) -> None:
        for begun in self.fp32_groups_has_gradients:
            begun[:] = [False] * len(begun)


def patch_gradient_sums(zero: Any, data: Axis, overlaps: bool) -> None:
    """Change the class of DeepSpeed's `zero` to the patched one, if it is stage 1's in bf16."""
    if not isinstance(zero, BF16_Optimizer):
        return
    zero.__class__ = PatchedBf16Optimizer
    zero.data, zero.overlaps = data, overlaps and data.size > 1
    zero.pieces, zero.piece_of = [], []
    for flat, gradients in zip(
        zero.fp32_groups_gradients_flat, zero.fp32_groups_gradients, strict=True
    ):
        groups = list(_in_pieces([gradient.numel() for gradient in gradients]))
        zero.piece_of.append([0] * len(gradients))
        stop = flat.numel()
        for first, last in groups:
            start = sum(gradient.numel() for gradient in gradients[:first])
            for index in range(first, last):
                zero.piece_of[-1][index] = len(zero.pieces)
            zero.pieces.append((flat[start:stop], last - first))
            stop = start


def _in_pieces(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Ranges of parameters of at least PIECE elements, the last first: so gradients come."""
    last = len(sizes)
    while last:
        first, elements = last, 0
        while first and elements < PIECE:
            first -= 1
            elements += sizes[first]
        yield first, last
        last = first
