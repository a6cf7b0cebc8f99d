"""`checkpoint diff`: what two checkpoints hold in common, and how far each tensor moved."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megahybrid.checkpoint.fragments import STATES, Box, whole
from megahybrid.checkpoint.reader import Reader
from megahybrid.config.old_words import current_tree

# Of each of the two checkpoints at a time, so that a tensor of any size fits in memory.
CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True)
class TensorChange:
    """One state of one tensor that both hold, of the same shape."""

    tensor: str
    state: str
    elements: int
    changed: int  # elements whose bits differ
    relative: float  # ‖b - a‖₂ / ‖a‖₂; infinite where a is zero and b is not
    largest: float  # max |b - a|


@dataclass(frozen=True)
class Difference:
    """`only_a`, `only_b`: "tensor (state)" that only one of them holds, or of another shape."""

    changes: tuple[TensorChange, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    facts: tuple[tuple[str, Any, Any], ...]  # dotted fields of config and manifest that differ


def difference(a: Reader, b: Reader, states: tuple[str, ...] = ("weight",)) -> Difference:
    """Compare b with a, tensor by tensor; the most changed first."""
    holds_a, holds_b = _held(a, states), _held(b, states)
    both = [key for key in holds_a if holds_b.get(key) == holds_a[key]]
    changes = [_tensor_change(a, b, *key) for key in both]
    changes.sort(key=lambda change: (-change.relative, change.tensor, change.state))
    return Difference(
        tuple(changes),
        tuple(f"{name} ({state})" for name, state in holds_a if (name, state) not in both),
        tuple(f"{name} ({state})" for name, state in holds_b if (name, state) not in both),
        tuple(_facts(_manifest_facts(a), _manifest_facts(b))),
    )


def row_boxes(shape: tuple[int, ...], elements: int = CHUNK_ELEMENTS) -> Iterator[Box]:
    """A tensor cut in runs of rows of at most so many elements (at least one row each)."""
    if not shape:
        yield ()
        return
    rows = max(1, elements // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield ((start, min(start + rows, shape[0])), *whole(shape[1:]))


def _held(reader: Reader, states: tuple[str, ...]) -> dict[tuple[str, str], tuple[int, ...]]:
    return {
        (name, state): tensor.shape
        for name, tensor in reader.manifest.tensors.items()
        for state in STATES
        if state in states and state in tensor.states
    }


def _tensor_change(a: Reader, b: Reader, name: str, state: str) -> TensorChange:
    shape = a.manifest.tensors[name].shape
    moved = size = largest = 0.0
    changed = 0
    for box in row_boxes(shape):
        old, new = a.read(name, state, box), b.read(name, state, box)
        changed += int((old.view(np.uint32) != new.view(np.uint32)).sum())
        step = new.astype(np.float64) - old
        moved += float(np.square(step).sum())
        size += float(np.square(old.astype(np.float64)).sum())
        largest = max(largest, float(np.abs(step).max(initial=0.0)))
    relative = 0.0 if moved == 0 else math.sqrt(moved / size) if size else math.inf
    return TensorChange(name, state, math.prod(shape), changed, relative, largest)


def _manifest_facts(reader: Reader) -> dict[str, Any]:
    manifest = reader.manifest
    names = ("step", "tokens", "optimizer_step", "model_fingerprint")
    return {name: getattr(manifest, name) for name in names} | {
        "config": current_tree(manifest.config, str(reader.path))
    }


def _facts(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in [*a, *(key for key in b if key not in a)]:
            inner = f"{path}.{key}" if path else str(key)
            yield from _facts(a.get(key, "absent"), b.get(key, "absent"), inner)
    elif a != b:
        yield path.removeprefix("config."), a, b
