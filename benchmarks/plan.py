"""One call on one GPU: parts in order, each within the time and the memory that are left."""

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.shapes import random_batch
from megahybrid.config.model import ModelConfig

TOKENS_PER_STEP = 32768


class Plan:
    """What is measured, where, and until when."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device("cpu" if options.rehearse else "cuda:0")
        self.dtype = torch.bfloat16
        self.deadline = time.monotonic() + options.budget_seconds
        self.memory = (
            8 * 2**30
            if options.rehearse
            else torch.cuda.get_device_properties(self.device).total_memory
        )
        self.rows: list[dict[str, Any]] = []
        self.kernels: dict[int, dict[str, str]] = {}  # by length: full, windowed
        self.compiled = False  # our blocks, once that was seen to be faster
        self.notes: list[str] = []

    def kernels_of_layers(self, config: ModelConfig, length: int) -> list[str]:
        """The measured kernel of each layer at this length; at one that was not measured, those of
        the longest."""
        chosen = self.kernels.get(length) or self.kernels.get(self.options.lengths[-1], {})
        return [
            chosen.get("full" if scheme.window is None else "windowed", "auto")
            for scheme in config.layer_plan.expand()
        ]

    def left(self) -> float:
        """Seconds until the plan should end."""
        return self.deadline - time.monotonic()

    def part(self, name: str, seconds: float, run: Callable[[], Any]) -> Any:
        """`run()`, unless less than `seconds` are left; a failure is a note."""
        if self.left() < seconds:
            self.note(f"{name}: not run, {self.left():.0f} s were left and it wants {seconds:.0f}")
            return None
        started = time.monotonic()
        try:
            return run()
        except Exception as error:  # a peer may fail in any way; the other parts still count
            lines = str(error).splitlines()
            self.note(f"{name}: {type(error).__name__}: {lines[0][:160] if lines else ''}")
            return None
        finally:
            self.free()
            print(f"  [{time.monotonic() - started:5.1f} s] {name}", flush=True)

    def note(self, text: str) -> None:
        """Something for the end of the table."""
        self.notes.append(text)
        print(f"  {text}", flush=True)

    def free(self) -> None:
        """Give memory of the last part back."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self) -> float:
        """The most that tensors took since the last `free`."""
        if self.device.type != "cuda":
            return 0.0
        return torch.cuda.max_memory_allocated(self.device) / 2**30

    def batch(self, config: ModelConfig, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One step's rows: at least one, else TOKENS_PER_STEP tokens (two in a rehearsal)."""
        return random_batch(config, self.rows_of(length), length, self.device)

    def rows_of(self, length: int) -> int:
        """Rows of one step."""
        return 2 if self.options.rehearse else max(1, TOKENS_PER_STEP // length)


def fits(run: Callable[[], Any]) -> bool:
    """Whether `run` stays within the card's memory. Its frames are gone on return, so that what
    they held can be freed."""
    try:
        run()
    except torch.OutOfMemoryError:
        return False
    return True
