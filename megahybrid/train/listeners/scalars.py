"""Ledger lines as flat names and numbers, the same for every tracker."""

from megahybrid.ledger import AttentionEvent, EvaluateEvent, EventLine, StepLine, SuiteEvent

_PLAIN = (
    "loss", "z_loss", "learning_rate", "gradient_norm", "length", "tokens_per_second", "mfu",
    "memory_gib",
)  # fmt: skip


def step_scalars(line: StepLine) -> dict[str, float]:
    """`train/loss`, `gradient_norm/attention`, `seconds/data`, `source_tokens/stdlib`, …"""
    scalars = {f"train/{name}": getattr(line, name) for name in _PLAIN}
    scalars["train/skipped"] = int(line.skipped)
    for group, values in (
        ("gradient_norm", line.gradient_norm_by_kind),
        ("seconds", line.seconds),
        ("source_tokens", line.source_tokens),
    ):
        scalars.update({f"{group}/{name}": value for name, value in values.items()})
    return {name: value for name, value in scalars.items() if value is not None}


def event_scalars(line: EventLine) -> dict[str, float]:
    """Return the numbers of an evaluation, a suite or a sample of attention; else none."""
    match line.content:
        case EvaluateEvent() as score:
            found = _evaluation(score)
        case SuiteEvent() as asked:
            found = _suite(asked)
        case AttentionEvent() as sample:
            found = _attention(sample)
        case _:  # facts and faults: a curve has no place for them
            return {}
    return {name: value for name, value in found.items() if value is not None}


def _suite(asked: SuiteEvent) -> dict[str, float | None]:
    """`suite/SUITE/TASK/FIGURE/LENGTH`; of RULER the length follows its own task."""
    return {
        f"suite/{asked.suite}/{task}/{figure}/{place}": value
        for task, scores in asked.tasks.items()
        for figure, values in scores.figures().items()
        for place, value in values.items()
    }


def _attention(sample: AttentionEvent) -> dict[str, float | None]:
    """`attention/KIND/FIGURE` by kind of layer."""
    return {
        f"attention/{kind}/{figure}": value
        for kind, part in sample.by_kind.items()
        for figure, value in {
            "entropy_bits": part.entropy_bits,
            "max_logit": part.max_logit,
            "distance": part.distance,
            "sink": part.sink,
            **{f"mass_{segment}": share for segment, share in (part.mass or {}).items()},
        }.items()
    }


def _evaluation(score: EvaluateEvent) -> dict[str, float | None]:
    """`held_out/SET/loss` and `held_out/SET/loss_at_START_STOP`. SET ends in `_documents` where the
    rows are single documents."""
    rows = score.rows or "stream"
    prefix = f"held_out/{score.set}" + ("" if rows == "stream" else f"_{rows}")
    return {f"{prefix}/loss": score.loss} | {
        f"{prefix}/loss_at_{bucket.start}_{bucket.stop}": bucket.loss
        for bucket in score.by_position
    }
