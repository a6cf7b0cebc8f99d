"""Lengths of documents as a corpus has them."""

import random


def document_lengths(length: int, seed: int) -> list[int]:
    """Return lengths of documents that fill a row of `length` tokens: log-normal with a mean near
    800 tokens; the last is cut."""
    draw, found = random.Random(seed), []
    while sum(found) < length:
        found.append(max(1, min(int(draw.lognormvariate(6.0, 1.2)), length - sum(found))))
    return found
