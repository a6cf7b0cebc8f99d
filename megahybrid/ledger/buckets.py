"""Parts of the events that score held-out sets: means over ranges of positions, and over turns, in
nats per token; and the bits per byte in which losses of different tokenizers compare."""

import math
from dataclasses import dataclass

from megahybrid.config.shape import Count, Positive

Number = float | None  # None, NaN and infinities are gaps
LEAST_DOCUMENTS = 8  # a mean over fewer is drawn hollow, and never said in words


@dataclass(frozen=True)
class PositionBucket:
    """Targets whose input token stands at document positions [start, stop)."""

    start: Count
    stop: Positive
    tokens: Count
    loss: Number  # nats per token; None where no token fell into the bucket
    documents: Count | None = None  # that have a target there
    low: Number = None  # 95 % interval of the loss, over documents
    high: Number = None


@dataclass(frozen=True)
class GainBucket:
    """Context gain of the targets whose input token stands at document positions [start, stop)."""

    start: Count
    stop: Positive
    tokens: Count
    documents: Count
    gain: Number  # nats per token; None where no token fell into the bucket
    low: Number = None  # 95 % interval, over documents; None for fewer than two
    high: Number = None


@dataclass(frozen=True)
class TurnLoss:
    """Targets in one of the assistant's turns, from 1 on; the last stands for all later ones."""

    turn: Positive
    tokens: Count
    loss: Number  # nats per token


def bits_per_byte(nats: float | None, tokens: int, text_bytes: int | None) -> float | None:
    """Nats per token as bits per byte of the text that the tokens stand for; None where there is
    none, or it is not known."""
    if nats is None or not text_bytes:
        return None
    return nats * tokens / math.log(2) / text_bytes
