"""What a part measures with: shape, device, memory, and what earlier parts of the call found."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.shapes import SHAPES, hybrid, random_batch
from megahybrid.config.model import ModelConfig

SHAPE, LENGTHS = "1b", (8192, 32768, 131072)
MICRO_BATCH_TOKENS = 32768
# Two micro-batches where rows allow it: sums of gradients are part of the product's step.
TOKENS_PER_STEP = 2 * MICRO_BATCH_TOKENS
REHEARSAL_SHAPE, REHEARSAL_LENGTHS = "tiny", (64, 128, 256)
REHEARSAL_GIB = 8


@dataclass
class Setting:
    """One process's share of a call."""

    device: torch.device
    shape: str
    lengths: Sequence[int]
    memory: int  # bytes of the card
    rehearsal: bool
    kernels: dict[int, dict[str, str]] = field(default_factory=dict)  # by length: full, windowed
    compiled: bool = False

    @classmethod
    def of(cls, rehearse: bool) -> "Setting":
        """The card's, or a rehearsal's on the CPU."""
        if rehearse:
            torch.set_num_threads(1)
            gib = REHEARSAL_GIB * 2**30
            return cls(torch.device("cpu"), REHEARSAL_SHAPE, REHEARSAL_LENGTHS, gib, True)
        device = torch.device("cuda:0")
        memory = torch.cuda.get_device_properties(device).total_memory
        return cls(device, SHAPE, LENGTHS, memory, False)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return torch.bfloat16

    def hybrid(self) -> ModelConfig:
        """The model of the headline."""
        return hybrid(self.shape)

    def heads(self) -> tuple[int, int, int]:
        """(heads, kv_heads, head_dim)."""
        sizes = SHAPES[self.shape]
        return (
            sizes["num_heads"],
            sizes["num_kv_heads"],
            sizes["hidden_size"] // sizes["num_heads"],
        )

    def kernels_of_layers(self, config: ModelConfig, length: int) -> list[str]:
        """The fastest kernel of each layer at this length, as earlier parts measured it; at one
        that was not measured, that of the longest."""
        chosen = self.kernels.get(length) or self.kernels.get(max(self.kernels, default=0), {})
        return [
            chosen.get("full" if scheme.window is None else "windowed", "auto")
            for scheme in config.layer_plan.expand()
        ]

    def rows_of(self, length: int) -> int:
        """Rows of one step."""
        return 2 if self.rehearsal else max(1, TOKENS_PER_STEP // length)

    def micro_rows_of(self, length: int) -> int:
        """Rows of one micro-batch: two micro-batches a step where there are two rows."""
        return max(1, self.rows_of(length) // 2)

    def batch(self, config: ModelConfig, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One step's rows and targets."""
        return random_batch(config, self.rows_of(length), length, self.device)

    def free(self) -> None:
        """Give the memory of what is no longer held back, and forget the peak."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self) -> float:
        """The most that tensors took since the last `free`."""
        if self.device.type != "cuda":
            return 0.0
        return torch.cuda.max_memory_allocated(self.device) / 2**30

    def learn(self, rows: Sequence[dict[str, Any]]) -> None:
        """Take the fastest kernels, and whether compiled blocks are faster, from earlier rows."""
        best: dict[tuple[int, str], float] = {}
        for row in rows:
            if "kernel" in row and "seconds" in row and not row.get("packed"):
                key = (row["length"], row["layer"])
                if row["seconds"] < best.get(key, float("inf")):
                    best[key] = row["seconds"]
                    self.kernels.setdefault(row["length"], {})[row["layer"]] = row["kernel"]
        speeds = {
            row["blocks"]: row["tokens_per_second"]
            for row in rows
            if row.get("step") == "hybrid" and row.get("length") == self.lengths[0]
        }
        self.compiled = speeds.get("compiled", 1.0) >= speeds.get("plain", 0.0)


def fits(run: Any) -> bool:
    """Whether `run` stays within the card's memory. Its frames are gone on return, so that what
    they held can be freed."""
    try:
        run()
    except torch.OutOfMemoryError:
        return False
    return True
