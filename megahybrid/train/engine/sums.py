"""Gradients of micro-batches, summed in fp32 where ZeRO leaves them whole: stage 1 in bf16.

DeepSpeed makes an fp32 copy of each gradient to add it, and sets the sums to zero twice a step: 26
bytes a parameter for the first micro-batch, 26 with the bf16 gradient's own sum for each that
follows. Here the first is copied to its place and others are added as they are: 6 bytes and 10, and
the same bits. To be imported after `prepare_deepspeed`.
"""

from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor


class DirectSums(BF16_Optimizer):
    """What an optimizer of DeepSpeed's becomes by `sum_directly`. The methods are DeepSpeed's own
    and private (it is pinned); they are called as each gradient is complete, at the end of each
    backward pass before sums travel, and twice after an update."""

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
        lp._hp_grad = total

    @torch.no_grad()
    def update_hp_grads(self, clear_lp_grads: bool = False) -> None:
        for group, begun in enumerate(self.fp32_groups_has_gradients):
            for index, there in enumerate(begun):
                if not there:  # what stands there is of an earlier step
                    self.fp32_groups_gradients[group][index].zero_()

    def clear_hp_grads(self) -> None:
        for begun in self.fp32_groups_has_gradients:
            begun[:] = [False] * len(begun)


def sum_directly(zero: Any) -> None:
    """Have DeepSpeed's `zero` sum gradients so, if it is the one of stage 1 in bf16."""
    if isinstance(zero, BF16_Optimizer):
        zero.__class__ = DirectSums
