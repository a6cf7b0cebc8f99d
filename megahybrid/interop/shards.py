"""Safetensors written tensor by tensor, each in bands of rows: any size in little memory."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megahybrid.checkpoint import durable
from megahybrid.checkpoint.reader import Reader
from megahybrid.interop.architectures.tensor_names import TensorName

SHARD_BYTES = 4 * 2**30
BAND_BYTES = 32 * 2**20
DTYPES = {"fp32": ("F32", torch.float32, 4), "bf16": ("BF16", torch.bfloat16, 2)}
INDEX_NAME = "model.safetensors.index.json"
Rows = Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class OutTensor:
    """A tensor to write: `rows(start, stop)` gives a band of it in fp32, in multiples of `step`."""

    name: str
    shape: tuple[int, ...]
    rows: Rows
    step: int = 1


def write_shards(
    folder: Path, tensors: Sequence[OutTensor], dtype: str, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write model.safetensors, or numbered shards and their index; returns the bytes of tensors.

    A tensor larger than `shard_bytes` has a shard of its own. Raises OSError.
    """
    width = DTYPES[dtype][2]
    shards: list[list[OutTensor]] = [[]]
    held = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * width
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += size
    total = sum(math.prod(tensor.shape) for tensor in tensors)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        durable.write(folder / name, _chunks(shard, dtype))
        weight_map.update({tensor.name: name for tensor in shard})
    if len(shards) > 1:
        metadata = {"total_parameters": total, "total_size": total * width}
        index = {"metadata": metadata, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        durable.write(folder / INDEX_NAME, [memoryview(text.encode())])
    return total * width


def _chunks(tensors: Sequence[OutTensor], dtype: str) -> Iterator[memoryview]:
    word, torch_dtype, width = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + math.prod(tensor.shape) * width
        header[tensor.name] = {
            "dtype": word,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        for rows in _bands(tensor):
            yield rows.to(torch_dtype).view(torch.uint8).numpy().reshape(-1).data


def exact_dtype(tensors: Sequence[OutTensor]) -> str:
    """Return bf16 where every number is one of bf16's, as after an import of such weights, and
    else fp32: the dtype of fewest bytes that rounds nothing. Stops at the first band that bf16
    would round."""
    bands = (rows for tensor in tensors for rows in _bands(tensor))
    exact = all(torch.equal(rows, rows.to(torch.bfloat16).float()) for rows in bands)
    return "bf16" if exact else "fp32"


def _bands(tensor: OutTensor) -> Iterator[torch.Tensor]:
    """Yield the rows of a tensor in fp32, at most BAND_BYTES of them at a time."""
    row_bytes = max(1, math.prod(tensor.shape[1:]) * 4)
    band = max(tensor.step, BAND_BYTES // row_bytes // tensor.step * tensor.step)
    for start in range(0, tensor.shape[0], band):
        rows = tensor.rows(start, min(start + band, tensor.shape[0]))
        yield torch.from_numpy(np.ascontiguousarray(rows))


def row_bands(name: TensorName, head_dim: int) -> Iterator[tuple[int, int]]:
    """Yield the rows of a tensor in pieces of BAND_BYTES in fp32; of whole heads if it is
    reordered."""
    row = math.prod(name.shape[1:])
    step = _step(name, head_dim)
    band = max(step, BAND_BYTES // (4 * row) // step * step)
    for start in range(0, name.shape[0], band):
        yield start, min(start + band, name.shape[0])


def _step(name: TensorName, head_dim: int) -> int:
    return head_dim if name.order is not None and not name.in_last_dimension else 1


def reordered(
    rows: np.ndarray, name: TensorName, head_dim: int, inverse: bool = False
) -> np.ndarray:
    """Return whole heads of a tensor as they keep them (`inverse`: as we do): rows in their order,
    less what they add to each number.

    In fp32 a weight w >= 1/2 of theirs (1 + v) loses nothing: w - 1 is exact, and 1 + v is what
    their class computes in fp32 itself. Below, 1 + (w - 1) is w within 2^-25.
    """
    if name.offset:
        rows = rows + np.float32(name.offset if inverse else -name.offset)
    if name.order is None:
        return rows
    order = np.array(name.order)
    if inverse:
        order = np.argsort(order)
    if name.in_last_dimension:
        return rows[:, order]
    heads = rows.reshape(-1, head_dim, *rows.shape[1:])
    return heads[:, order].reshape(rows.shape)


def as_read(values: torch.Tensor, dtype: torch.dtype, offset: float = 0.0) -> torch.Tensor:
    """Return numbers of ours in fp32 as a folder in `dtype` gives them back: rounded in the form in
    which it keeps them, less `offset`."""
    if not offset:
        return values.to(dtype).float()
    return (values - offset).to(dtype).float() + offset


def out_tensors(reader: Reader, names: Sequence[TensorName], head_dim: int) -> list[OutTensor]:
    """Return the tensors that an export writes, read from a checkpoint as they are needed."""

    def rows(name: TensorName) -> Rows:
        def read(start: int, stop: int) -> np.ndarray:
            if name.ours is None:
                return np.full((stop - start, *name.shape[1:]), name.constant, dtype=np.float32)
            box = ((start, stop), *((0, size) for size in name.shape[1:]))
            values = reordered(reader.read(name.ours, "weight", box), name, head_dim)
            # Closing lets go of the mapped pages, which would otherwise count as memory.
            reader.close()
            return values

        return read

    return [OutTensor(n.theirs, n.shape, rows(n), _step(n, head_dim)) for n in names]
