"""`checkpoint resize-vocab`: a checkpoint whose model knows more tokens than it was trained with.

A chat's special tokens come to a model that has no rows for them. Each new row is the mean of the
trained ones, a token that means nothing in particular yet and whose logit is the ordinary one; its
moments are zero, as those of a row that no step has touched.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megahybrid.checkpoint.diff import CHUNK_ELEMENTS, row_boxes
from megahybrid.checkpoint.directory import RunLock, check_model
from megahybrid.checkpoint.fingerprint import model_fingerprint
from megahybrid.checkpoint.folders import refuse_occupied
from megahybrid.checkpoint.fragments import Array, Box, Fragment, State, volume, whole
from megahybrid.checkpoint.reader import FlatValues, Reader, verify
from megahybrid.checkpoint.writer import SaveResult, Snapshot, save
from megahybrid.config import RunConfig
from megahybrid.config.parsing import parse_json
from megahybrid.errors import CheckpointError

OTHER_MODEL = "this one is of another model"  # why it stands in no folder of others
OF_TOKENS = ("embedding.weight", "head.weight")  # canonical tensors with a row for each token


@dataclass(frozen=True)
class Growth:
    """Rows before `first` were trained and stay; those from it to `vocab_size` are new.

    tokenizer, sha256: the file of the tokenizer that the model knows from now on.
    """

    first: int
    vocab_size: int
    tokenizer: str
    sha256: str


def resize_vocabulary(path: Path, out: Path, growth: Growth) -> SaveResult:
    """Write the checkpoint `path` with new rows to `out`/checkpoints/step-N, N its own step.

    Every byte is verified first, and every weight and moment but the new rows' is as it was. The
    config names the new vocabulary and tokenizer, the fingerprint is that of the model it makes,
    and `train_state.resized` says what it was made of. Raises CheckpointError where `out` holds a
    checkpoint already, or rows would be taken away.
    """
    refuse_occupied(out, OTHER_MODEL)
    manifest = verify(path)
    config = json.loads(json.dumps(manifest.config))
    before = config["model"]["vocab_size"]
    if growth.vocab_size < before or not 0 < growth.first < growth.vocab_size:
        raise CheckpointError(
            f"{path} has rows for {before} tokens, and --tokenizer={growth.tokenizer} has "
            f"{growth.vocab_size}: there is none to add. Train on with the checkpoint as it is."
        )
    config["model"]["vocab_size"] = growth.vocab_size
    config["data"]["tokenizer"] = growth.tokenizer
    run = parse_json(RunConfig, json.dumps(config))
    made = {
        "checkpoint": str(path.resolve()),
        "step": manifest.step,
        "vocab_size": before,
        "trained_rows": growth.first,
        "tokenizer": growth.sha256,
    }
    shapes = {
        name: (growth.vocab_size, *tensor.shape[1:]) if name in OF_TOKENS else tensor.shape
        for name, tensor in manifest.tensors.items()
    }
    states = next(iter(manifest.tensors.values())).states
    with Reader(path) as reader:
        snapshot = Snapshot(
            step=manifest.step,
            tokens=manifest.tokens,
            optimizer_step=manifest.optimizer_step,
            model_fingerprint=model_fingerprint(run.model),
            tensors=shapes,
            fragments=list(_fragments(reader, shapes, growth)),
            train_state={**manifest.train_state, "resized": made},
            config=config,
            states=states,
        )
        try:
            with RunLock(out):
                check_model(out, snapshot.model_fingerprint)
                return save(out, snapshot, keep_last=10**9)
        except OSError as error:
            raise CheckpointError(f"--out={out} cannot be written ({error.strerror}).").because(
                error
            ) from None


class _GrownRows(FlatValues):
    """Values of rows of which those from the first new one on are made."""

    def __init__(self, reader: Reader, name: str, state: State, box: Box, first_new: int) -> None:
        super().__init__(reader, name, state, box)
        self.first_new = first_new

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        rows, columns = self.box
        first = min(max(self.first_new, rows[0]), rows[1])
        parts = []
        if rows[0] < first:
            parts.append(self.reader.read(self.name, self.state, ((rows[0], first), columns)))
        if first < rows[1]:
            row = np.zeros(columns[1], np.float32)
            if self.state == "weight":
                row = _mean_row(self.reader, self.name, self.first_new)
            parts.append(np.tile(row, (rows[1] - first, 1)))
        return np.concatenate(parts).reshape(-1)


def _mean_row(reader: Reader, name: str, rows: int) -> Array:
    """The mean of a tensor's first rows, summed in float64 a few million elements at a time."""
    columns = reader.manifest.tensors[name].shape[1]
    total = np.zeros(columns, np.float64)
    for box in row_boxes((rows, columns), CHUNK_ELEMENTS):
        total += reader.read(name, "weight", box).sum(axis=0, dtype=np.float64)
    return (total / rows).astype(np.float32)


def _fragments(
    reader: Reader, shapes: dict[str, tuple[int, ...]], growth: Growth
) -> Iterator[Fragment]:
    for name, shape in shapes.items():
        for state in reader.manifest.tensors[name].states:
            at = 0
            for box in row_boxes(shape, CHUNK_ELEMENTS):
                stop = at + volume(box)
                values = FlatValues(reader, name, state, box)
                if name in OF_TOKENS:
                    values = _GrownRows(reader, name, state, box, growth.first)
                yield Fragment(name, state, whole(shape), (at, stop), values)
                at = stop
