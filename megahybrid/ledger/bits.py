"""Nats per token as bits per byte of text, in which different tokenizers' losses compare."""

import math


def bits_per_byte(nats: float | None, tokens: int, text_bytes: int | None) -> float | None:
    """Nats per token as bits per byte of the text that the tokens stand for; None where there is
    none, or it is not known."""
    if nats is None or not text_bytes:
        return None
    return nats * tokens / math.log(2) / text_bytes
