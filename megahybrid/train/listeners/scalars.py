"""Ledger lines as flat names and numbers, the same for every tracker."""

from collections.abc import Iterator
from typing import Any

from megahybrid.train.ledger import EventLine, StepLine

_PLAIN = (
    "loss", "learning_rate", "gradient_norm", "length", "tokens_per_second", "mfu", "memory_gib",
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
    """The numbers of an evaluation, a suite or a sample of attention; of other events none."""
    made = {"evaluate": _evaluation, "suite": _suite, "attention": _attention}.get(line.event)
    found = {} if made is None else made(line)
    return {name: value for name, value in found.items() if value is not None}


def _suite(line: EventLine) -> dict[str, float]:
    """`suite/SUITE/TASK/FIGURE/LENGTH`; of RULER the length follows its own task."""
    return {
        f"suite/{line.detail['suite']}/{task}/{figure}/{place}": value
        for task, told in line.detail["tasks"].items()
        for figure, values in told.items()
        if isinstance(values, dict)
        for place, value in values.items()
    }


def _attention(line: EventLine) -> dict[str, float]:
    """`attention/KIND/FIGURE` by kind of layer."""
    return {
        f"attention/{kind}/{figure}": value
        for kind, part in line.detail["by_kind"].items()
        for figure, value in (*part.items(), *_masses(part))
        if isinstance(value, int | float)
    }


def _masses(part: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for segment, value in part["mass"].items():
        yield f"mass_{segment}", value


def _evaluation(line: EventLine) -> dict[str, float]:
    """`held_out/SET/loss` and `held_out/SET/loss_at_START_STOP`. SET ends in `_documents` where the
    rows are single documents."""
    rows = line.detail.get("rows", "stream")
    prefix = f"held_out/{line.detail['set']}" + ("" if rows == "stream" else f"_{rows}")
    scalars = {f"{prefix}/loss": line.detail["loss"]}
    for bucket in line.detail.get("by_position", ()):
        scalars[f"{prefix}/loss_at_{bucket['start']}_{bucket['stop']}"] = bucket["loss"]
    return scalars
