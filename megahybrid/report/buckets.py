"""Buckets of positions joined until each has enough targets to have a mean."""

from collections.abc import Sequence
from typing import Any

LEAST_TOKENS = 256  # a mean of fewer is off by more than the differences that the plot is about


def joined_buckets(
    buckets: Sequence[dict[str, Any]], least_tokens: int = LEAST_TOKENS
) -> list[dict[str, Any]]:
    """Neighbouring buckets joined until each has `least_tokens` targets; empty ones stay empty.

    The mean of a handful of targets says nothing, and the first buckets of a few documents hold no
    more than that. What is left over before an empty bucket joins the one before it.
    """
    joined: list[dict[str, Any]] = []
    for bucket in buckets:
        last = joined[-1] if joined else None
        if last and last["loss"] is not None and bucket["loss"] is not None:
            if last["tokens"] < least_tokens:
                joined[-1] = _together(last, bucket)
                continue
        elif last and bucket["loss"] is None:
            _join_left_over(joined, least_tokens)
        joined.append(bucket)
    _join_left_over(joined, least_tokens)
    return joined


def _join_left_over(joined: list[dict[str, Any]], least_tokens: int) -> None:
    if len(joined) < 2 or joined[-1]["loss"] is None or joined[-2]["loss"] is None:
        return
    if joined[-1]["tokens"] < least_tokens:
        left_over = joined.pop()
        joined[-1] = _together(joined[-1], left_over)


def _together(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    tokens = first["tokens"] + second["tokens"]
    total = first["loss"] * first["tokens"] + second["loss"] * second["tokens"]
    return {
        "start": first["start"],
        "stop": second["stop"],
        "tokens": tokens,
        "loss": total / tokens,
    }
