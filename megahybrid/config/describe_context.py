"""What `describe` and `check` tell of context ranks: exchanges, bytes and work, beside what the
same ranks would move otherwise."""

from dataclasses import asdict
from typing import Any

from megahybrid.config.context import (
    HeadShape,
    work_max_over_mean,
)
from megahybrid.config.context_check import row_multiple
from megahybrid.config.context_plan import ContextPlan, plan_context
from megahybrid.config.context_volume import period_volume, tensor_bytes
from megahybrid.config.memory_estimate import policies_of
from megahybrid.config.run import RunConfig
from megahybrid.config.stages import Recompute
from megahybrid.errors import ConfigError

MOST_DEGREES = 512  # of a row that are listed


def context_lines(run: RunConfig) -> list[str]:
    """Return what `check` prints: a line for each length, "65,536 tokens over 8 context ranks
    (contiguous): local halo, global heads", and the legal degrees. None without context ranks."""
    if run.parallel.context_axis == 1:
        return []
    lines: dict[str, None] = {}
    for index, stage in enumerate(run.stages):
        for length in stage.lengths:
            lines.setdefault(_plan(run, index, length).in_words())
    heads = HeadShape.of(run.model, run.parallel.tensor).legal_degrees()
    lengths = {length for stage in run.stages for length in stage.lengths}
    return [*lines, *(_legal_in_words(n, _legal(run, n), heads) for n in sorted(lengths))]


def _legal_in_words(length: int, degrees: list[int], heads: list[int]) -> str:
    shown = ", ".join(str(n) for n in degrees[:10]) + (" …" if len(degrees) > 10 else "")
    split = ", ".join(str(n) for n in heads[:10]) + (" …" if len(heads) > 10 else "")
    return f"legal context degrees at {length:,} tokens: {shown}; heads over {split}"


def describe_context(run: RunConfig, data_degree: int) -> list[dict[str, Any]]:
    """Return what is true of each length of each stage; nothing without context ranks."""
    if run.parallel.context_axis == 1:
        return []
    rows = []
    heads = HeadShape.of(run.model, run.parallel.tensor).legal_degrees()
    for index, stage in enumerate(run.stages):
        policies = _policies(run, index, data_degree)
        for length in stage.lengths:
            row: dict[str, Any] = {
                "stage": stage.name,
                "length": length,
                "tokens_per_rank": stage.micro_batch_tokens // run.parallel.context_axis,
            }
            row["legal_degrees"] = _legal(run, length)
            row["legal_degrees_heads"] = heads
            rows.append(row | _length(run, index, length, data_degree, policies))
    return rows


def _policies(run: RunConfig, index: int, data_degree: int) -> list[Recompute]:
    try:
        return policies_of(run, index, data_degree)
    except ConfigError:  # a budget that so few ranks do not meet: all that can be saved is
        return ["offload"] * run.model.layer_plan.num_layers


def _length(
    run: RunConfig, index: int, length: int, data_degree: int, policies: list[Recompute]
) -> dict[str, Any]:
    found, plan = _plan(run, index, length), run.plan_at(index)
    width = 4 if run.precision == "fp32" else 2

    def tensor(policy: Recompute) -> int:
        again = policy in ("full", "offload")
        tokens = found.tokens_per_rank
        return tensor_bytes(run.model, run.parallel.tensor, tokens, forward_again=again)

    rows = _rows_per_step(run, index, found, data_degree)
    schemes = []
    for crossing, exchange in found.crossings:
        again = [
            policy in ("full", "offload")
            for policy, of in zip(policies, plan.names(), strict=True)
            if of == crossing.scheme
        ]
        schemes.append(
            {
                "scheme": crossing.name,
                "layers": len(again),
                "window": crossing.window,
                "exchange": exchange,
                "bytes_per_step": sum(
                    rows * found.crossing_bytes(crossing, exchange, width, forward_again=one)
                    for one in again
                ),
                "work_max_over_mean": work_max_over_mean(
                    *(found.layout, exchange, crossing.window, length, found.degree),
                    near=crossing.windows[1:],
                )
                if exchange is not None
                else 1.0,
            }
        )
    return {
        "degree": found.degree,
        "layout": found.layout,
        "tensor_bytes_per_step": rows * sum(map(tensor, policies)),
        "rows_per_step": rows,
        "schemes": schemes,
        "period": asdict(period_volume(run.model, run.parallel, plan, length)),
    }


def _plan(run: RunConfig, index: int, length: int) -> ContextPlan:
    return plan_context(run.model, run.parallel, run.plan_at(index), length)


def _rows_per_step(run: RunConfig, index: int, crossing: ContextPlan, data_degree: int) -> int:
    """Return the rows of a step in which one rank has a part, at the stage's last batch size."""
    groups = data_degree * run.parallel.context_axis // crossing.degree
    return run.stages[index].batch_levels()[-1][1] // (crossing.length * groups)


def _legal(run: RunConfig, length: int) -> list[int]:
    """Return the degrees that cut a row of `length` tokens evenly, contiguous."""
    most = min(length, MOST_DEGREES)
    tensor = run.parallel.tensor
    degrees = range(1, most + 1)
    return [n for n in degrees if length % row_multiple("contiguous", n, tensor) == 0]


def context_tables(rows: list[dict[str, Any]], table: Any) -> list[Any]:
    """Return `describe_context` as tables; `table` makes an empty one of a title and columns."""
    return [_exchange_table(rows, table), _period_table(rows, table)] if rows else []


def _exchange_table(rows: list[dict[str, Any]], table: Any) -> Any:
    made = table(
        "MB that a context rank receives a step, and the busiest one's work over the mean",
        ("stage", "length", "ranks", "layout", "scheme", "exchange"),
        ("layers", "MB/step", "work"),
    )
    before = None
    for row in rows:
        for index, scheme in enumerate(row["schemes"]):
            first = index == 0
            made.add_row(
                row["stage"] if row["stage"] != before else "",
                f"{row['length']:,}" if first else "",
                str(row["degree"]) if first else "",
                row["layout"] if first and row["degree"] > 1 else "",
                scheme["scheme"],
                scheme["exchange"] or "none",
                str(scheme["layers"]),
                f"{scheme['bytes_per_step'] / 1e6:,.0f}",
                f"{scheme['work_max_over_mean']:.2f}",
            )
            before = row["stage"]
    return made


def _period_table(rows: list[dict[str, Any]], table: Any) -> Any:
    made = table(
        "MB that a rank receives for a row and a period of layers (bf16): ours, one\n"
        "exchange for all layers, and tensor ranks alone on the same GPUs",
        (),
        ("length", "ranks", "ours", "heads", "keys", "ring", "+ tensor", "tensor alone"),
    )
    seen = set()
    for row in rows:
        found = row["period"]
        values = tuple(found[n] for n in ("ours", "heads", "keys", "ring", "tensor"))
        values += (found["tensor_alone"],)
        if row["degree"] == 1 or (row["length"], values) in seen:
            continue
        seen.add((row["length"], values))
        told = ("not legal" if value is None else f"{value / 1e6:,.0f}" for value in values)
        made.add_row(f"{row['length']:,}", str(row["degree"]), *told)
    return made


def legal_in_words(rows: list[dict[str, Any]]) -> list[str]:
    """Return "legal context degrees at 65,536 tokens: 1, 2, 4 …; heads over 1, 2, 4, 8", a line for
    each length."""
    lines = (
        _legal_in_words(row["length"], row["legal_degrees"], row["legal_degrees_heads"])
        for row in rows
    )
    return list(dict.fromkeys(lines))
