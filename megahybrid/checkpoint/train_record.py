"""The training part of a manifest: checked as a whole, so that nobody who reads it has to ask.

Every field may be missing: a checkpoint that training did not write has few. Whoever needs one says
so itself. Fields of a later version stay.
"""

from typing import Any

from megahybrid.config.base import Count, Frozen, UnixSeconds
from megahybrid.config.training import KernelConfig


class ParentRecord(Frozen, extra="allow"):
    """The checkpoint that a run branched off."""

    checkpoint: str
    take: str = "all"
    step: Count = 0
    tokens: Count = 0


class AveragedRecord(Frozen, extra="allow"):
    """One of the checkpoints that a mean was made of."""

    checkpoint: str
    step: Count
    share: float


class ResizedRecord(Frozen, extra="allow"):
    """The checkpoint that was given rows for more tokens, and how many it had."""

    checkpoint: str
    step: Count
    vocab_size: Count
    trained_rows: Count
    tokenizer: str = ""


class KernelRecord(KernelConfig, extra="allow"):
    """The kernels that a run had, and the kind of device they were chosen on."""

    device: str = "cpu"
    length: str | None = None


class SourceRecord(Frozen, extra="allow"):
    """The position in one source of the data; its cursor is checked by the source's own order."""

    cursor: Any = None
    tokens: Count = 0
    fingerprint: str | dict[str, str] = ""  # by length, of a source with plans
    targets: Count = 0


class DataRecord(Frozen, extra="allow"):
    """The position in the data. Empty before the first row."""

    weights: dict[str, float] | None = None
    since: dict[str, Count] | None = None
    longest: Count = 0
    gone: tuple[str, ...] = ()
    sources: dict[str, SourceRecord] | None = None


class TrainRecord(Frozen, extra="allow"):
    """`train_state` of a manifest."""

    step: Count = 0
    tokens: Count = 0
    data: DataRecord | None = None
    skipped_in_a_row: Count = 0
    recent: tuple[tuple[float, float], ...] = ()
    kernels: KernelRecord | None = None
    parent: ParentRecord | None = None
    averaged: tuple[AveragedRecord, ...] | None = None
    resized: ResizedRecord | None = None
    schemes: dict[str, dict[str, Any]] | None = None


class WrittenBy(Frozen, extra="allow"):
    """`written_by` of a manifest."""

    megahybrid: str = "unknown"
    ranks: Count = 0
    time_unix: UnixSeconds = 0.0
