"""`ShardSpec`: the one description of how a parameter holds canonical tensors.

A parameter of a tensor rank is the concatenation, along dimension 0, of its shards of one or more
canonical tensors (query, key and value fused, for example). Each shard is a box of its canonical
tensor and lies contiguously in the parameter, so that a checkpoint fragment is a flat range.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Segment:
    """A canonical tensor in a parameter: `dim` is cut over the tensor axis, None: replicated.

    `filler` rows of zeros, which belong to no tensor, lie behind each rank's shard: products whose
    width is no multiple of eight are slower.
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None
    filler: int = 0

    def __post_init__(self) -> None:
        if self.dim is not None and not 0 <= self.dim < len(self.shape):
            raise ValueError(f"{self.name}: dimension {self.dim} is not one of shape {self.shape}")
        if self.filler and self.dim != 0:
            raise ValueError(f"{self.name}: only what is cut by rows can have {self.filler} more")


@dataclass(frozen=True)
class ShardSpec:
    """The layout of the parameter of tensor rank `rank` of `degree`.

    `padded` is the padded size of the cut dimension of a vocabulary (canonical shapes are never
    padded): the box is clipped to the canonical tensor and may be empty, padding rows come last.
    """

    segments: tuple[Segment, ...]
    degree: int
    rank: int
    padded: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.degree:
            raise ValueError(f"tensor rank {self.rank} is not below the degree {self.degree}")
        if self.padded is not None:
            (segment,) = self.segments  # only the vocabulary is padded, and it is never fused
            if segment.dim != 0 or self.padded < segment.shape[0]:
                raise ValueError(f"{segment.name}: cannot pad {segment.shape} to {self.padded}")
        for segment in self.segments:
            if segment.dim is not None and self._global_size(segment) % self.degree:
                raise ValueError(
                    f"{segment.name}: {self._global_size(segment)} is not divisible by the tensor "
                    f"degree {self.degree}"
                )

    @property
    def sharded(self) -> bool:
        """True where ranks hold different values: DeepSpeed counts these on every tensor rank."""
        return any(segment.dim is not None for segment in self.segments)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of the local parameter in memory."""
        shapes = [self.local_shape(segment) for segment in self.segments]
        if len(shapes) == 1:
            return shapes[0]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def local_shape(self, segment: Segment) -> tuple[int, ...]:
        """Shape of this rank's shard in memory, padding included."""
        if segment.dim is None:
            return segment.shape
        local = self._global_size(segment) // self.degree + segment.filler
        return (*segment.shape[: segment.dim], local, *segment.shape[segment.dim + 1 :])

    def box(self, segment: Segment) -> Box:
        """(start, stop) in every dimension of the canonical tensor, padding clipped away."""
        ranges = [(0, size) for size in segment.shape]
        if segment.dim is not None:
            local = self._global_size(segment) // self.degree
            size = segment.shape[segment.dim]
            start = min(self.rank * local, size)
            ranges[segment.dim] = (start, min(start + local, size))
        return tuple(ranges)

    def flat_ranges(self) -> list[tuple[Segment, int, int]]:
        """(segment, start, stop): where each box lies in the flattened local parameter."""
        ranges, offset = [], 0
        for segment in self.segments:
            ranges.append((segment, offset, offset + math.prod(box_shape(self.box(segment)))))
            offset += math.prod(self.local_shape(segment))
        return ranges

    def split(self, full: Mapping[str, Tensor]) -> Tensor:
        """The local parameter out of the full canonical tensors; padding rows are zero."""
        example = full[self.segments[0].name]
        local = torch.zeros(self.parameter_shape, dtype=example.dtype, device=example.device)
        flat = local.view(-1)
        for segment, start, stop in self.flat_ranges():
            tensor = full[segment.name]
            if tuple(tensor.shape) != segment.shape:
                raise ValueError(f"{segment.name}: {tuple(tensor.shape)} is not {segment.shape}")
            flat[start:stop] = tensor[box_slices(self.box(segment))].reshape(-1)
        return local

    @staticmethod
    def join(shards: Sequence[tuple["ShardSpec", Tensor]]) -> dict[str, Tensor]:
        """The full canonical tensors out of all tensor ranks' parameters, in any order.

        Replicated tensors are taken from tensor rank 0. Raises ValueError when ranks are missing.
        """
        ordered = sorted(shards, key=lambda shard: shard[0].rank)
        first = ordered[0][0]
        if [spec.rank for spec, _ in ordered] != list(range(first.degree)):
            found = [spec.rank for spec, _ in ordered]
            raise ValueError(f"tensor ranks {found} are not the {first.degree} ranks of the degree")
        if any((s.segments, s.degree) != (first.segments, first.degree) for s, _ in ordered):
            raise ValueError("the shards are not of one parameter: segments or degrees differ")
        joined: dict[str, Tensor] = {}
        for spec, local in ordered:
            flat = local.reshape(-1)
            for segment, start, stop in spec.flat_ranges():
                if segment.dim is None and spec.rank > 0:
                    continue
                box = spec.box(segment)
                if segment.name not in joined:
                    joined[segment.name] = local.new_empty(segment.shape)
                joined[segment.name][box_slices(box)] = flat[start:stop].view(box_shape(box))
        return joined

    def _global_size(self, segment: Segment) -> int:
        """Size of the cut dimension over all ranks, padding included."""
        assert segment.dim is not None
        return self.padded if self.padded is not None else segment.shape[segment.dim]


def box_shape(box: Box) -> tuple[int, ...]:
    """Lengths of a box."""
    return tuple(stop - start for start, stop in box)


def box_slices(box: Box) -> tuple[slice, ...]:
    """A box as an index of the canonical tensor."""
    return tuple(slice(start, stop) for start, stop in box)


def attach_shard_spec(parameter: nn.Parameter, spec: ShardSpec) -> nn.Parameter:
    """Attach the spec, and DeepSpeed's flag, which must be true only where ranks hold shards.

    DeepSpeed adds a flagged parameter's gradient norm over the tensor axis and takes an unflagged
    one's from tensor rank 0; a wrong flag makes a wrong norm without a warning.
    """
    if tuple(parameter.shape) != spec.parameter_shape:
        names = ", ".join(segment.name for segment in spec.segments)
        raise ValueError(f"{names}: shape {tuple(parameter.shape)} is not {spec.parameter_shape}")
    parameter.shard_spec = spec  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = spec.sharded  # type: ignore[attr-defined]
    return parameter


def shard_spec(parameter: nn.Parameter) -> ShardSpec:
    """Return the spec that `attach_shard_spec` attached.

    Raises ValueError for a parameter that nobody described.
    """
    spec = getattr(parameter, "shard_spec", None)
    if not isinstance(spec, ShardSpec):
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} has no ShardSpec: attach one where it "
            "is made, else checkpoints and the gradient norm would miss it"
        )
    return spec
