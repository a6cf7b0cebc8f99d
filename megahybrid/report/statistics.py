"""Means over many: the loss in buckets of positions with enough targets to have a mean, and how
often needles were found within the trained length and beyond."""

from collections.abc import Sequence
from dataclasses import dataclass

from megahybrid.ledger import PositionBucket
from megahybrid.report.evaluation_files import EvaluationFile
from megahybrid.report.record import Evaluation

LEAST_TOKENS = 256  # a mean of fewer is off by more than the differences that the plot is about


def curve_buckets(one: Evaluation) -> tuple[list[PositionBucket], list[PositionBucket]]:
    """The buckets of a curve of loss by position, and those beyond it that few documents reach.

    A curve is of the same documents at every position, where the ledger has them; else of all, with
    buckets of few targets joined.
    """
    same = one.same_documents
    if not same:
        return joined_buckets(one.by_position), []
    beyond = [b for b in one.by_position if b.start >= same[-1].stop and b.loss is not None]
    return list(same), beyond


def joined_buckets(
    buckets: Sequence[PositionBucket], least_tokens: int = LEAST_TOKENS
) -> list[PositionBucket]:
    """Join neighbouring buckets until each has `least_tokens` targets; empty ones stay empty.

    The mean of a handful of targets says nothing, and the first buckets of a few documents hold no
    more than that. What is left over before an empty bucket joins the one before it.
    """
    joined: list[PositionBucket] = []
    for bucket in buckets:
        last = joined[-1] if joined else None
        if last and last.loss is not None and bucket.loss is not None:
            if last.tokens < least_tokens:
                joined[-1] = _together(last, bucket)
                continue
        elif last and bucket.loss is None:
            _join_left_over(joined, least_tokens)
        joined.append(bucket)
    _join_left_over(joined, least_tokens)
    return joined


def _join_left_over(joined: list[PositionBucket], least_tokens: int) -> None:
    if len(joined) < 2 or joined[-1].loss is None or joined[-2].loss is None:
        return
    if joined[-1].tokens < least_tokens:
        left_over = joined.pop()
        joined[-1] = _together(joined[-1], left_over)


def _together(first: PositionBucket, second: PositionBucket) -> PositionBucket:
    assert first.loss is not None and second.loss is not None
    tokens = first.tokens + second.tokens
    total = first.loss * first.tokens + second.loss * second.tokens
    return PositionBucket(first.start, second.stop, tokens, total / tokens)


@dataclass(frozen=True)
class NeedleRate:
    """Shares of trials whose whole answer was right, over all depths and needle tasks."""

    within: float
    beyond: float | None  # None: nothing longer was asked
    trials: int  # within
    trained: int


def needle_rate(results: Sequence[EvaluationFile]) -> NeedleRate | None:
    """Count the needles found by every needle task of the newest suites; None where no task stays
    within the trained length."""
    within: list[tuple[float, int]] = []
    beyond: list[tuple[float, int]] = []
    trained = 0
    for one in results:
        if one.kind != "suite" or not one.result.get("trained_length"):
            continue
        trained = one.result["trained_length"]
        for told in one.result["tasks"].values():
            if told["kind"] == "needle":
                for row in told["rows"]:
                    trials = row.get("trials", told["trials"])
                    near = row["length"] <= trained
                    (within if near else beyond).append((row["exact"] * trials, trials))
    if not within:
        return None
    trials = sum(count for _, count in within)
    past = sum(count for _, count in beyond)
    return NeedleRate(
        sum(right for right, _ in within) / trials,
        sum(right for right, _ in beyond) / past if past else None,
        trials,
        trained,
    )
