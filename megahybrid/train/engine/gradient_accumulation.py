"""Gradients of micro-batches, summed in fp32 where ZeRO leaves them whole: stage 1 in bf16.

DeepSpeed makes an fp32 copy of each gradient to add it, and sets the sums to zero twice a step: 26
bytes a parameter for the first micro-batch, 26 with the bf16 gradient's own sum for each that
follows. Here the first is copied to its place and others are added as they are: 6 bytes and 10, and
the same bits. It reduces the sums over the data axis when the last backward pass is over, whole, to
every rank and rounded to bf16 unless told otherwise; here they travel as they are, each part to the
rank that updates it alone (half the bytes), bucket by bucket while that pass runs. New weights come
back the same way while the next forward pass runs. To be imported after `prepare_deepspeed`.
"""

from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import is_model_parallel_parameter
from torch import Tensor, nn

from megahybrid.parallel.collectives import Pending, start_gather_of_slices, start_sum_of_slices
from megahybrid.parallel.mesh import Axis, ParallelMesh


class PatchedBf16Optimizer(BF16_Optimizer):
    """DeepSpeed's optimizer with our sums of gradients; `patch_gradient_sums` makes one into it.

    Its methods have DeepSpeed's names, some of them private (pyproject.toml pins the version), and
    are called as each backward pass begins, as each gradient is complete, at the end of the pass,
    and twice after an update. Each of its groups is reduced and gathered as one bucket, in the
    order of the groups, which `in_buckets` made that in which their gradients are complete.
    """

    replica: Axis
    overlaps: bool
    counted: list[Tensor]  # what this rank adds to the norm: views of its part of the gradients
    boundary = False  # whether this micro-batch is the step's last
    missing: list[int]  # gradients of each group
    reducing: list[Pending]
    gathering: dict[int, Pending]  # by group: weights that others have made
    hooks: list[Any]  # by which layers wait for them

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self.boundary = is_boundary

    def backward_prologue(self) -> None:
        super().backward_prologue()
        self.missing, self.reducing = [len(group) for group in self.bf16_groups], []

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
        self.missing[group_idx] -= 1
        if self.boundary and self.overlaps:
            # Always in the same order, as far as all gradients are complete.
            while self._reduced_next() and not self.missing[len(self.reducing)]:
                self._reduce_next()

    @torch.no_grad()
    def update_hp_grads(self, clear_lp_grads: bool = False) -> None:
        for group, begun in enumerate(self.fp32_groups_has_gradients):
            for index, there in enumerate(begun):
                if not there:  # what stands there is of an earlier step
                    self.fp32_groups_gradients[group][index].zero_()

    def _reduced_next(self) -> bool:
        return len(self.reducing) < len(self.fp32_groups_gradients_flat)

    def _reduce_next(self) -> Pending:
        flat = self.fp32_groups_gradients_flat[len(self.reducing)]
        self.reducing.append(start_sum_of_slices(flat, self.replica))
        return self.reducing[-1]

    @torch.no_grad()
    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """The mean over the replicas of the part that this rank updates, at the end of a step's
        last backward pass. What stands elsewhere is of no use from then on."""
        if self.replica.size == 1:
            return
        while self._reduced_next():
            pending = self._reduce_next()
            if not self.overlaps:
                pending.wait()  # one bucket's room at a time
        for pending in self.reducing:
            pending.wait().mul_(1.0 / self.replica.size)

    @torch.no_grad()
    def get_grads_for_norm(self, for_clipping: bool = False) -> Any:
        """This rank's part of the gradients: for the norm, what no other rank counts."""
        if self.replica.size == 1:
            return super().get_grads_for_norm(for_clipping)
        return self.fp32_groups_gradient_flat_partition if for_clipping else (self.counted, {})

    @torch.no_grad()
    def update_lp_params(self) -> None:
        if self.replica.size == 1:
            super().update_lp_params()
            return
        self.wait_for_weights()
        for parts, masters in zip(
            self.bf16_partitioned_groups, self.fp32_groups_flat_partition, strict=True
        ):
            parts[self.replica.rank].copy_(masters)
        # A forward pass reads them in the other order than gradients come in.
        for group in reversed(range(len(self.bf16_groups_flat))):
            flat = self.bf16_groups_flat[group]
            self.gathering[group] = start_gather_of_slices(flat, self.replica)
        if not self.overlaps:
            self.wait_for_weights()

    def wait_for_weights(self, groups: frozenset[int] | None = None) -> None:
        """Return when the weights of these groups are there; None: all."""
        for group in list(self.gathering) if groups is None else groups & self.gathering.keys():
            self.gathering.pop(group).wait()

    def destroy(self) -> None:
        self.wait_for_weights()
        for hook in self.hooks:
            hook.remove()
        super().destroy()

    def clear_hp_grads(self) -> None:
        for begun in self.fp32_groups_has_gradients:
            begun[:] = [False] * len(begun)


class WholeNorm:
    """Tells DeepSpeed that the squares of a norm are summed over all ranks: each has a part."""

    def __init__(self, world: Axis) -> None:
        self._group = world.group

    def get_model_parallel_group(self) -> Any:
        """Group over which `step` sums."""
        return self._group


def patch_gradient_sums(zero: Any, model: nn.Module, mesh: ParallelMesh, overlaps: bool) -> None:
    """Change the class of DeepSpeed's `zero` to the patched one, if it is stage 1's in bf16.

    With `overlaps` gradients are reduced while a backward pass of `model` runs, and weights come
    while its next forward pass does: whoever reads them otherwise asks `wait_for_weights` first.
    """
    if not isinstance(zero, BF16_Optimizer):
        return
    zero.__class__ = PatchedBf16Optimizer
    zero.replica, zero.gathering, zero.hooks = mesh.replica, {}, []
    zero.overlaps = overlaps and mesh.replica.size > 1
    if mesh.replica.size == 1:
        return
    # DeepSpeed stacks the norms it is given: there is one at least.
    zero.counted = _counted(zero, mesh) or [zero.fp32_groups_gradients_flat[0].new_zeros(1)]
    zero.mpu = WholeNorm(mesh.world)
    if zero.overlaps:
        zero.hooks = _wait_where_read(zero, model)


def _counted(zero: Any, mesh: ParallelMesh) -> list[Tensor]:
    """The views of this rank's part of the gradients that lie in parameters which its tensor rank
    counts: replicated ones are counted on the first alone."""
    counted = []
    for parameters, own in zip(
        zero.bf16_groups, zero.fp32_groups_gradient_flat_partition, strict=True
    ):
        first = mesh.replica.rank * own.numel()
        start = 0
        for parameter in parameters:
            stop = start + parameter.numel()
            low, high = max(start, first), min(stop, first + own.numel())
            if low < high and (mesh.tensor.rank == 0 or is_model_parallel_parameter(parameter)):
                counted.append(own[low - first : high - first])
            start = stop
    return counted


def _wait_where_read(zero: Any, model: nn.Module) -> list[Any]:
    """Have each layer wait for its own weights before it runs. Where no gradients are wanted,
    layers are also run by halves: there the first waits for all."""
    group_of = {id(lp): group for group, lps in enumerate(zero.bf16_groups) for lp in lps}
    layers = [
        layer
        for child in model.children()
        for layer in (child if isinstance(child, nn.ModuleList) else [child])
    ]

    def hook(groups: frozenset[int]) -> Any:
        def wait(*_: Any) -> None:
            zero.wait_for_weights(groups if torch.is_grad_enabled() else None)

        return wait

    return [
        layer.register_forward_pre_hook(
            hook(frozenset(group_of[id(parameter)] for parameter in layer.parameters()))
        )
        for layer in layers
    ]
