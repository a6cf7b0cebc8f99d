"""`checkpoint average`: the mean of several checkpoints' weights, as a checkpoint of its own.

As recipes do at the end of annealing. Moments have no mean that means anything and are left out: a
run may branch off the result with start.take=weights.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from megahybrid.checkpoint.diff import CHUNK_ELEMENTS, row_boxes
from megahybrid.checkpoint.directory import RunLock, check_model
from megahybrid.checkpoint.folders import refuse_occupied
from megahybrid.checkpoint.fragments import Array, Box, Fragment, volume, whole
from megahybrid.checkpoint.reader import Reader, verify
from megahybrid.checkpoint.writer import SaveResult, Snapshot, save
from megahybrid.errors import CheckpointError


def average(paths: Sequence[Path], out: Path, shares: Sequence[float] | None = None) -> SaveResult:
    """Write Σ share·weight / Σ share to `out`/checkpoints/step-N, N the newest one's step.

    Summed in float64, rounded once, a few million elements at a time. Position in the data, stage
    and config are the newest one's; `train_state.averaged` lists what went in. Every byte of every
    input is verified first. Raises CheckpointError where they are of different models, or where
    `out` holds a checkpoint already: a run that found a mean in its place could not go on.
    """
    refuse_occupied(out, "the mean would stand among them or in the place of one")
    shares = [1.0] * len(paths) if shares is None else list(shares)
    if len(shares) != len(paths) or not (
        all(share > 0 for share in shares) and math.isfinite(sum(shares))
    ):
        raise CheckpointError(
            f"--shares gives {len(shares)} numbers ({', '.join(f'{s:g}' for s in shares)}) for "
            f"{len(paths)} checkpoints. Give one above 0 for each."
        )
    for path in paths:
        verify(path)
    with ExitStack() as stack:
        readers = [stack.enter_context(Reader(path)) for path in paths]
        newest = max((reader.manifest for reader in readers), key=lambda found: found.tokens)
        for reader in readers:
            if reader.manifest.model_fingerprint != newest.model_fingerprint:
                raise CheckpointError(
                    f"{reader.path} is of another model ({reader.manifest.model_fingerprint}; "
                    f"the newest is {newest.model_fingerprint}). Average checkpoints of one model."
                )
        shapes = {name: tensor.shape for name, tensor in newest.tensors.items()}
        total = sum(shares)
        parts = [share / total for share in shares]
        averaged = [
            {"checkpoint": str(reader.path.resolve()), "step": reader.manifest.step, "share": part}
            for reader, part in zip(readers, parts, strict=True)
        ]
        snapshot = Snapshot(
            step=newest.step,
            tokens=newest.tokens,
            optimizer_step=newest.optimizer_step,
            model_fingerprint=newest.model_fingerprint,
            tensors=shapes,
            fragments=list(_fragments(readers, parts, shapes)),
            train_state={**newest.train_state, "averaged": averaged},
            config=newest.config,
            states=("weight",),
        )
        try:
            stack.enter_context(RunLock(out))
            check_model(out, newest.model_fingerprint)
        except OSError as error:
            raise CheckpointError(f"--out={out} cannot be written ({error.strerror}).").because(
                error
            ) from None
        return save(out, snapshot, keep_last=10**9)


class _Mean:
    """Flat float32 values that are computed when they are written."""

    def __init__(
        self, readers: Sequence[Reader], parts: Sequence[float], name: str, box: Box
    ) -> None:
        self._readers, self._parts, self._name, self._box = readers, parts, name, box

    def __len__(self) -> int:
        return volume(self._box)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        mean = np.zeros(len(self), dtype=np.float64)
        for reader, part in zip(self._readers, self._parts, strict=True):
            mean += part * reader.read(self._name, "weight", self._box).reshape(-1)
        return mean.astype(np.float32)


def _fragments(
    readers: Sequence[Reader], parts: Sequence[float], shapes: dict[str, tuple[int, ...]]
) -> Iterator[Fragment]:
    for name, shape in shapes.items():
        at = 0
        for box in row_boxes(shape, CHUNK_ELEMENTS):
            stop = at + volume(box)
            mean = _Mean(readers, parts, name, box)
            yield Fragment(name, "weight", whole(shape), (at, stop), mean)
            at = stop
