"""How fast a run goes: exact FLOPs of a batch, MFU, seconds by phase, time left, memory.

MFU counts the products a step needs (forward and backward, without recompute) by the exact number
of (query, key) pairs that each layer's mask lets through, over the device's published dense bf16
peak. On a CPU and in fp32 there is no such peak: a measured one would differ from minute to minute
on a shared machine and make runs incomparable, so MFU is None there.
"""

import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megahybrid.config.counting import kv_heads_of_views, matrix_parameters
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig

# Dense bf16 FLOP/s without sparsity, from NVIDIA's data sheets; the first name that occurs in the
# device's name counts, so the narrower names come first.
PEAK_FLOPS_PER_SECOND = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}
PHASES = ("data", "forward_backward", "update", "save", "evaluate")
# Rows of a batch are counted this many tokens at a time, to keep the temporary arrays small.
_CHUNK_TOKENS = 1 << 22


def peak_flops_per_second(device_name: str, precision: str) -> float | None:
    """The published peak of one device, or None where there is none to compare with."""
    if precision != "bf16":
        return None
    return next((peak for name, peak in PEAK_FLOPS_PER_SECOND.items() if name in device_name), None)


def attended_pairs(starts: Any, windows: Sequence[int | None], chunks: Sequence[int] = ()) -> int:
    """(query, key) pairs of a batch that the masks let through, summed over the layers.

    `starts` [batch, seq] (numpy or a CPU tensor) is the index within its row of the first token of
    each token's document; `windows` has one entry per layer: the keys a query sees, itself
    included, or None for all earlier keys of the document; `chunks` one for each layer with chunks.
    """
    starts = np.asarray(starts)
    rows_at_once = max(1, _CHUNK_TOKENS // max(1, starts.shape[1]))
    positions = np.arange(starts.shape[1], dtype=np.int64)
    pairs = 0
    for begin in range(0, starts.shape[0], rows_at_once):
        visible = positions + 1 - starts[begin : begin + rows_at_once]
        for window, layers in Counter(windows).items():
            seen = visible if window is None else np.minimum(visible, window)
            pairs += layers * int(seen.sum())
        for chunk, layers in Counter(chunks).items():
            pairs += layers * int(((visible - 1) % chunk + 1).sum())
    return pairs


@dataclass(frozen=True)
class StepFlops:
    """Products of a training step: so many per token, so many per attended pair of a layer."""

    per_token: int
    per_pair: int
    windows: tuple[int | None, ...]
    chunks: tuple[int, ...] = ()

    @classmethod
    def from_model(
        cls, model: ModelConfig, windows: Sequence[int | None], chunks: Sequence[int] = ()
    ) -> "StepFlops":
        """Forward and backward (three times forward), the head included, the embedding's look-up
        and everything that is no matrix product left out."""
        return cls(
            per_token=6 * matrix_parameters(model),
            per_pair=12 * model.num_heads * model.head_dim,
            windows=tuple(windows),
            chunks=tuple(chunks),
        )

    @classmethod
    def of_plan(cls, model: ModelConfig, plan: LayerPlan) -> "StepFlops":
        """Return those of a plan's layers, each view of a layer with the heads that have it."""
        split = any(scheme.split is not None for scheme in plan.schemes.values())
        parts = model.num_kv_heads if split else 1
        views = [
            view
            for scheme in plan.expand()
            for view, heads in kv_heads_of_views(scheme, parts)
            for _ in range(heads)
        ]
        windows = [view.window for view in views if view.chunk is None]
        chunks = [view.chunk for view in views if view.chunk is not None]
        whole = cls.from_model(model, windows, chunks)
        return replace(whole, per_pair=whole.per_pair // parts)

    def of(self, starts: Any) -> int:
        """FLOPs of a batch with these document starts [batch, seq]."""
        tokens = int(np.asarray(starts).size)
        pairs = attended_pairs(starts, self.windows, self.chunks)
        return self.per_token * tokens + self.per_pair * pairs


def mfu(flops: float | int, seconds: float, peak: float | None, devices: int) -> float | None:
    """Share of the peak that `devices` devices reached together, 0 to 1; None without a peak."""
    if peak is None or seconds <= 0:
        return None
    return flops / seconds / (peak * devices)


class StepClock:
    """Wall seconds of a step by phase; what no phase claims is `other`.

    with clock.phase("data"): …      then `clock.lap()` at the end of the step.
    """

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside to `name`, one of PHASES."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - begin

    def add(self, name: str, seconds: float) -> None:
        """Counts `seconds` measured elsewhere to phase `name`."""
        self._seconds[name] += seconds

    def lap(self) -> dict[str, float]:
        """Seconds since the last lap: each phase, and `other`. Begins the next lap."""
        now = time.perf_counter()
        seconds = self._seconds
        seconds["other"] = max(0.0, now - self._begin - sum(seconds.values()))
        self._begin, self._seconds = now, dict.fromkeys(PHASES, 0.0)
        return seconds


def training_seconds(seconds: dict[str, float]) -> float:
    """The part of a lap that throughput and MFU count: all but saving and evaluating."""
    return sum(value for name, value in seconds.items() if name not in ("save", "evaluate"))


@dataclass
class TimeLeft:
    """Seconds to the end of the plan, from the FLOPs left and the pace of the last minutes.

    `segments` are the stages as (tokens at their end, FLOPs per token): a stage of another length
    costs another time per token, and the estimate knows it before it begins.
    """

    segments: Sequence[tuple[int, float | int]]
    window_seconds: float = 300.0
    _marks: deque[tuple[float, float]] = field(default_factory=deque)

    def update(self, tokens: int, now: float | None = None) -> float | None:
        """Tells how far the run is; returns the seconds left, None until there is a pace."""
        now = time.monotonic() if now is None else now
        done = self._flops_through(tokens)
        self._marks.append((now, done))
        while len(self._marks) > 2 and now - self._marks[1][0] > self.window_seconds:
            self._marks.popleft()
        began, done_then = self._marks[0]
        if now <= began or done <= done_then:
            return None
        left = self._flops_through(self.segments[-1][0]) - done
        return max(0.0, left) * (now - began) / (done - done_then)

    def _flops_through(self, tokens: int) -> float:
        flops, begin = 0.0, 0
        for end, per_token in self.segments:
            flops += per_token * max(0, min(tokens, end) - begin)
            begin = max(begin, end)
        return flops


def memory_gib(device: Any) -> float:
    """The most memory this process has held, in GiB: allocated by torch on a CUDA device, else
    resident in the machine's memory."""
    if getattr(device, "type", device) == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
