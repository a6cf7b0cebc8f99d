"""The places where ZeRO keeps this rank's fp32 masters and moments: views by parameter, and
fragments of them.

ZeRO cuts parameters into flat ranges. A `Piece` is the range of one parameter whose masters this
rank owns; everything outside this folder sees only fragments of canonical tensors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from megahybrid.checkpoint.fragments import STATES, Box, Flat, Fragment
from megahybrid.parallel.sharding import ShardSpec
from megahybrid.train.engine.adamw import ObservedAdamW


@runtime_checkable
class ReadFlat(Protocol):
    """Gives the fp32 values of a range of a flattened box, in `out` where that is given."""

    def __call__(
        self, name: str, state: str, box: Box, flat: Flat, /, out: np.ndarray | None = None
    ) -> np.ndarray: ...


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a parameter's flat local shard, as they lie inside `flat`."""

    name: str
    spec: ShardSpec
    start: int
    stop: int
    flat: Tensor  # the fp32 partition that the optimizer updates
    offset: int  # of `start` within `flat`

    def view(self, state: str, optimizer: ObservedAdamW) -> Tensor:
        """The master weights or a moment of this piece: a view, to read or to set."""
        whole = self.flat if state == "weight" else optimizer.state[self.flat][state]
        return whole.detach().view(-1)[self.offset : self.offset + self.stop - self.start]

    def segments(self) -> Iterator[tuple[str, Box, int, int, slice]]:
        """Canonical name, box, range within the flattened box, and where that lies in the piece.

        Vocabulary padding belongs to no segment and is left out.
        """
        for segment, begin, end in self.spec.flat_ranges():
            low, high = max(self.start, begin), min(self.stop, end)
            if low < high:
                within = slice(low - self.start, high - self.start)
                yield segment.name, self.spec.box(segment), low - begin, high - begin, within


class PartitionedState:
    """The masters and moments of one DeepSpeed engine on this rank."""

    def __init__(
        self,
        zero: Any,
        optimizer: ObservedAdamW,
        zero_stage: int,
        parameters: dict[str, tuple[nn.Parameter, ShardSpec]],
    ) -> None:
        """`zero` is DeepSpeed's wrapper of `optimizer` (the optimizer itself at stage 0)."""
        self.zero = zero
        self.optimizer = optimizer
        self.zero_stage = zero_stage
        self.flats = self._flats()
        for flat in self.flats:
            optimizer.create_state(flat)
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            zero._lazy_init_hp_params_optimizer_state()
        self.pieces = [
            piece
            for name, (parameter, spec) in parameters.items()
            if (piece := self._piece(name, parameter, spec)) is not None
        ]

    def _flats(self) -> list[Tensor]:
        if self.zero_stage == 0:
            return [flat for group in self.optimizer.param_groups for flat in group["params"]]
        if self.zero_stage == 3:
            return list(self.zero.fp32_partitioned_groups_flat)
        if hasattr(self.zero, "fp32_groups_flat_partition"):  # stage 1 in bf16
            return list(self.zero.fp32_groups_flat_partition)
        return list(self.zero.single_partition_of_fp32_groups)

    # Any: DeepSpeed hangs attributes of its own on parameters.
    def _piece(self, name: str, parameter: Any, spec: ShardSpec) -> Piece | None:
        if self.zero_stage == 0:
            return Piece(name, spec, 0, parameter.numel(), parameter, 0)
        if self.zero_stage == 3:
            group, offset, size = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = size * self.zero._get_param_partition_rank(parameter)
            stop = min(start + size, parameter.ds_numel)
            if start >= stop:
                return None
            return Piece(name, spec, start, stop, self.flats[group], offset)
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = self.flats[mapping.param_group_index]
        low = mapping.lp_fragment_address
        offset = mapping.hp_fragment_address.start
        return Piece(name, spec, low.start, low.start + low.numel, flat, offset)

    @property
    def optimizer_step(self) -> int:
        """Updates applied so far, as AdamW counts them."""
        return int(self.optimizer.state[self.flats[0]]["step"].item())

    def fragments(self, *, owns_replicated: bool, owns_data: bool) -> Iterator[Fragment]:
        """This rank's fragments of every tensor and state. Replicated parameters are yielded on
        tensor rank 0 alone; at stage 0 everything on data rank 0 alone."""
        if not owns_data:
            return
        for piece in self.pieces:
            if not (piece.spec.sharded or owns_replicated):
                continue
            for state in STATES:
                values = piece.view(state, self.optimizer)
                for name, box, begin, end, within in piece.segments():
                    part = values[within]
                    # From a device it is copied by whoever writes it, to memory of theirs.
                    data = part.numpy() if part.device.type == "cpu" else part
                    yield Fragment(name, state, box, (begin, end), data)

    @torch.no_grad()
    def load(self, read: ReadFlat, states: tuple[str, ...], optimizer_step: int | None) -> None:
        """Set this rank's pieces from canonical boxes, then refresh the weights that compute."""
        for piece in self.pieces:
            for state in states:
                target = piece.view(state, self.optimizer)
                for name, box, begin, end, within in piece.segments():
                    place = target[within]
                    if place.device.type == "cpu":
                        read(name, state, box, (begin, end), out=place.numpy())
                    else:
                        place.copy_(torch.from_numpy(read(name, state, box, (begin, end))))
        if optimizer_step is not None:
            for flat in self.flats:
                self.optimizer.state[flat]["step"].fill_(float(optimizer_step))
        self.refresh_weights()

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Copy the masters into the parameters that compute; without it a first step after a load
        would run on old weights."""
        if self.zero_stage == 3:
            self.zero.checkpoint_event_prologue()
            for group in range(len(self.flats)):
                self.zero._reassign_or_swap_out_partitioned_parameters(group)
            self.zero.checkpoint_event_epilogue()
        elif self.zero_stage > 0:
            self.zero.update_lp_params()
