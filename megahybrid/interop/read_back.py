"""Read back what was written: every number of every tensor bit for bit, and every field.

The logits of a proof touch a few hundred rows of an embedding, and no field that only says how long
a text may be or where it ends.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megahybrid.checkpoint.reader import Reader
from megahybrid.errors import InteropError
from megahybrid.interop.architectures.tensor_names import TensorName
from megahybrid.interop.hf_weights import ForeignWeights
from megahybrid.interop.shards import DTYPES, as_read, reordered, row_bands


def check_bits(
    reader: Reader,
    weights: ForeignWeights,
    names: Sequence[TensorName],
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    """Raise InteropError unless each tensor of a folder holds the bits of the checkpoint's, rounded
    to `dtype`, all of them finite; the first row that does not is named. A band of rows is in
    memory at a time.

    What only the folder has (sinks) may be any number that takes no weight: `check_tensors` looks.
    """
    for name in names:
        if name.ours is None:
            continue
        for start, stop in row_bands(name, head_dim):
            theirs = reordered(weights.rows(name.theirs, start, stop), name, head_dim, inverse=True)
            weights.close()
            box = ((start, stop), *((0, size) for size in name.shape[1:]))
            ours = _rounded(reader.read(name.ours, "weight", box), dtype, name.offset)
            reader.close()
            wrong = np.flatnonzero((_bits(theirs) != _bits(ours)).reshape(stop - start, -1).any(1))
            if len(wrong):
                raise InteropError(
                    f"{name.theirs} is not what the checkpoint holds as {name.ours}: "
                    f"{len(wrong)} of rows {start} to {stop - 1} differ, row {start + wrong[0]} "
                    "first (in the checkpoint's order). Nothing was published."
                )
            lost = np.flatnonzero(~np.isfinite(ours).reshape(stop - start, -1).all(1))
            if len(lost):
                raise InteropError(
                    f"{name.theirs} holds what is no finite number in {len(lost)} of rows {start} "
                    f"to {stop - 1}, row {start + lost[0]} first (in the checkpoint's order). "
                    "Nothing was published."
                )


def _rounded(values: np.ndarray, dtype: torch.dtype, offset: float) -> np.ndarray:
    return as_read(torch.from_numpy(np.ascontiguousarray(values)), dtype, offset).numpy()


def _bits(values: np.ndarray) -> np.ndarray:
    """Return the values as integers: a NaN equals itself, and zero is not minus zero."""
    return np.ascontiguousarray(values, dtype=np.float32).view(np.int32)


def check_dtype(folder: Path, dtype: str) -> None:
    """Raise InteropError unless each tensor of a folder is kept in `dtype`."""
    with ForeignWeights(folder) as weights:
        for name in sorted(weights.names()):
            if (held := weights.dtype(name)) != DTYPES[dtype][0]:
                raise InteropError(
                    f"{name} is {held} in its file, not {DTYPES[dtype][0]}. Nothing was published."
                )


def check_files(folder: Path, files: Mapping[str, str]) -> None:
    """Raise InteropError unless each text file holds what was written to it; of JSON the field that
    differs is named."""
    for name, text in files.items():
        try:
            found = (folder / name).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InteropError(
                f"{name} cannot be read back ({error}). Nothing was published."
            ) from None
        if found != text:
            what = _difference(found, text) if name.endswith(".json") else "its text differs"
            raise InteropError(f"{name} is not what was written: {what}. Nothing was published.")


def _difference(found: str, text: str) -> str:
    try:
        held = json.loads(found)
        wanted = json.loads(text)
        names = sorted(key for key in {*held, *wanted} if held.get(key) != wanted.get(key))
    except (ValueError, TypeError, AttributeError) as error:
        return f"it is no JSON object ({error})"
    if not names:
        return "its text differs"
    return "; ".join(f"{n}={held.get(n)!s:.80} instead of {wanted.get(n)!s:.80}" for n in names[:3])


def check_fields_as_read(folder: Path, fields: Mapping[str, Any], *, trust_code: bool) -> None:
    """Raise InteropError unless transformers reads these fields of a folder as they are meant."""
    from transformers import AutoConfig, GenerationConfig

    options: dict[str, Any] = {"local_files_only": True}
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_code, **options)
    generation = GenerationConfig.from_pretrained(str(folder), **options)
    for name, meant in fields.items():
        for file, holder in (("config.json", config), ("generation_config.json", generation)):
            read = getattr(holder, name, meant)
            if read != meant:
                raise InteropError(
                    f"transformers reads {name}={read} in {file}, but it is {meant}. "
                    "Nothing was published."
                )
