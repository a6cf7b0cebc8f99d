"""A Hugging Face folder on this disk: its safetensors, row by row. Pickles are never opened."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig
from megahybrid.errors import InteropError
from megahybrid.interop.architectures.base import Architecture
from megahybrid.interop.architectures.tensor_names import HEAD, TensorName
from megahybrid.interop.shards import INDEX_NAME, reordered

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")


class ForeignWeights:
    """The tensors of a folder, open for reading; a context manager. Raises InteropError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = _weight_map(folder)
        self._open: dict[str, Any] = {}

    def names(self) -> set[str]:
        """Return the name of every tensor."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return the dtype of one tensor as safetensors names it: F32, BF16."""
        return str(self._slice(name).get_dtype())

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return rows start…stop of a tensor in fp32. Raises InteropError where that rounds
        them."""
        found = self._slice(name)[start:stop]
        if not found.is_floating_point():
            raise InteropError(f"{self.folder}: {name} is {found.dtype}, not floating point.")
        rows = found.to(torch.float32)
        if found.dtype == torch.float64 and not torch.equal(rows.double(), found):
            raise InteropError(
                f"{self.folder}: {name} is float64 and holds numbers that fp32 does not have "
                f"(among rows {start} to {stop - 1}). Round it to fp32 yourself."
            )
        return rows.contiguous().numpy()

    def close(self) -> None:
        """Close the files, which frees the pages that were read."""
        self._open.clear()

    def __enter__(self) -> "ForeignWeights":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _slice(self, name: str) -> Any:
        file = self._files[name]
        if file not in self._open:
            self._open[file] = _open(self.folder / file)
        try:
            return self._open[file].get_slice(name)
        except SafetensorError:
            raise InteropError(f"{self.folder / file} has no {name}. Copy it again.") from None


class LargestValues:
    """The largest value of a tensor by its name, None where there is none. The folder is opened at
    the first question, so that whoever asks nothing learns of no fault in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._weights: ForeignWeights | None = None

    def __call__(self, name: str) -> float | None:
        if self._weights is None:
            self._weights = ForeignWeights(self.folder)
        with self._weights as weights:
            if name not in weights.names() or 0 in weights.shape(name):
                return None
            return float(weights.rows(name, 0, weights.shape(name)[0]).max())


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise InteropError(f"{path} cannot be read ({error}). Copy it again.") from None


def _weight_map(folder: Path) -> dict[str, str]:
    """Return the file of each tensor."""
    index = folder / INDEX_NAME
    single = folder / "model.safetensors"
    if single.exists():  # before the index, as transformers chooses
        return dict.fromkeys(_open(single).keys(), single.name)
    if index.exists():
        try:
            found = json.loads(index.read_bytes())["weight_map"]
            wrong = [
                file
                for file in found.values()
                if Path(file).name != file or not file.endswith(".safetensors")
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InteropError(f"{index} is damaged ({error}). Copy it again.") from None
        if wrong:
            raise InteropError(f"{index} names {wrong[0]!r}, which is no safetensors file here.")
        return dict(found)
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise InteropError(
            f"{folder} holds {pickles[0]} and no safetensors. Pickles can run code and are never "
            "read: ask for safetensors."
        )
    raise InteropError(f"{folder} holds no model.safetensors and no {INDEX_NAME}.")


def check_tensors(
    weights: ForeignWeights, model: ModelConfig, plan: LayerPlan, architecture: Architecture
) -> list[TensorName]:
    """Return every tensor of the model with both names. Raises InteropError where the folder has
    fewer, more, or others of another shape: nothing is guessed and nothing is dropped."""
    names = list(architecture.tensor_names(model, plan))
    held = {name for name in weights.names() if not name.endswith("rotary_emb.inv_freq")}
    if model.tie_embeddings:
        held.discard(HEAD)
    wanted = {name.theirs for name in names}
    for what, some in (("has no", wanted - held), ("has also", held - wanted)):
        if some:
            raise InteropError(
                f"{weights.folder} {what} {min(some)} ({len(some)} such tensors); a "
                f"{architecture.name}ForCausalLM of its config has {len(wanted)}."
            )
    for name in names:
        if weights.shape(name.theirs) != name.shape:
            raise InteropError(
                f"{weights.folder}: {name.theirs} has shape {list(weights.shape(name.theirs))}, "
                f"its config.json means {list(name.shape)}."
            )
        if name.ours is None:
            largest = float(weights.rows(name.theirs, 0, name.shape[0]).max())
            refusal = architecture.extra_refusal(name, largest)
            if refusal:
                raise InteropError(f"{weights.folder}: {refusal}")
    return names


class Band:
    """Rows of a tensor under our name, read when they are written: a fragment's data."""

    def __init__(
        self, weights: ForeignWeights, name: TensorName, start: int, stop: int, head_dim: int
    ) -> None:
        self.weights, self.name, self.rows, self.head_dim = weights, name, (start, stop), head_dim
        self.row = int(np.prod(name.shape[1:], dtype=np.int64))

    def __len__(self) -> int:
        return (self.rows[1] - self.rows[0]) * self.row

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        values = self.weights.rows(self.name.theirs, *self.rows)
        self.weights.close()
        return reordered(values, self.name, self.head_dim, inverse=True).reshape(-1)
