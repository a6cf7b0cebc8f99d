"""Ledger lines as flat names and numbers, the same for every tracker."""

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


def evaluation_scalars(line: EventLine) -> dict[str, float]:
    """`held_out/SET/loss` and `held_out/SET/loss_at_START_STOP`; nothing for other events. SET ends
    in `_documents` where the rows are single documents."""
    if line.event != "evaluate":
        return {}
    rows = line.detail.get("rows", "stream")
    prefix = f"held_out/{line.detail['set']}" + ("" if rows == "stream" else f"_{rows}")
    scalars = {f"{prefix}/loss": line.detail["loss"]}
    for bucket in line.detail.get("by_position", ()):
        scalars[f"{prefix}/loss_at_{bucket['start']}_{bucket['stop']}"] = bucket["loss"]
    return {name: value for name, value in scalars.items() if value is not None}
