"""The figures of a study's runs by name, their averages by variant, and whether its rules hold.

Names: task.length (answer tokens right; of a chat task, answers that end), task.length.exact,
task.length.KIND.needle (or begin, context, end, bits, and near, the share of a near view; KIND is a
kind of layer, or all),
loss.SET.first-last (positions, nats).
"""

import operator
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from megahybrid.config.study import Study, rule_parts
from megahybrid.errors import ConfigError

Result = Mapping[str, Any]
COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
# Two-sided 95 % of Student's t by degrees of freedom; beyond, the normal's.
STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160),
    *(2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056),
)


def figures_of(result: Result) -> dict[str, float]:
    """Every figure of one run."""
    found: dict[str, float] = {}
    for task, told in result.get("suite", {}).get("tasks", {}).items():
        for row in told.get("by_length", ()):
            found[f"{task}.{row['length']}"] = row["token_accuracy"]
            found[f"{task}.{row['length']}.exact"] = row["exact"]
        if told["kind"] == "ruler":
            found |= {f"{row['task']}.{row['length']}": row["score"] for row in told["rows"]}
        if told["kind"] == "chat":
            found |= {f"{task}.{row['length']}": row["ended"] for row in told["ended"]}
    for group in result.get("attention", {}).get("results", ()):
        looked = group["attention"]
        for kind, part in {**looked["by_kind"], "all": looked["all"]}.items():
            name = f"{group['task']}.{group['length']}.{kind}"
            found |= {f"{name}.{segment}": mass for segment, mass in part["mass"].items()}
            found[f"{name}.bits"] = part["entropy_bits"]
            if "near_share" in part:
                found[f"{name}.near"] = part["near_share"]
    for score in result.get("held_out", {}).get("scores", ()):
        for bucket in score["by_position"] if score["rows"] == "documents" else ():
            if bucket["loss"] is not None:
                place = f"{bucket['start']}-{bucket['stop'] - 1}"
                found[f"loss.{score['set']}.{place}"] = bucket["loss"]
    return found


def counts(plan: Study, result: Result) -> bool:
    """Return whether a run is past the gate."""
    if plan.gate is None:
        return True
    name = f"{plan.gate.task}.{plan.gate.length}"
    found = figures_of(result).get(name)
    if found is None:
        raise ConfigError(f"gate names {name}, which no run is scored on. Name a task's length.")
    return found >= plan.gate.least


def interval(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the mean, by Student's t; None for a single value."""
    if len(values) < 2:
        return None
    degrees = len(values) - 1
    factor = STUDENT[degrees - 1] if degrees <= len(STUDENT) else 1.96
    return factor * statistics.stdev(values) / len(values) ** 0.5


def tabulate(plan: Study, results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return a row for each variant.

    A row has its seeds, those past the gate, the processor's time for all, and every figure of
    those that count: median, least, most, mean, and half of the mean's 95 % interval.
    """
    rows = []
    for variant in plan.variants:
        mine = [result for result in results if result["variant"] == variant]
        counted = [result for result in mine if counts(plan, result)]
        values: dict[str, list[float]] = {}
        for result in counted:
            for name, value in figures_of(result).items():
                values.setdefault(name, []).append(value)
        rows.append(
            {
                "variant": variant,
                "seeds": sorted(result["seed"] for result in mine),
                "counted": sorted(result["seed"] for result in counted),
                "cpu_seconds": round(sum(result["seconds"]["cpu"] for result in mine), 1),
                "figures": {
                    name: {
                        "median": statistics.median(found),
                        "least": min(found),
                        "most": max(found),
                        "mean": statistics.fmean(found),
                        "interval": interval(found),
                        "runs": len(found),
                    }
                    for name, found in values.items()
                },
            }
        )
    return rows


def void(plan: Study, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Why no rule is judged, in one line: too few runs of the control are past the gate. None where
    they are enough, or the study has no control."""
    if plan.control is None:
        return None
    row = next(row for row in rows if row["variant"] == plan.control.variant)
    counted, run = len(row["counted"]), len(row["seeds"])
    if counted >= plan.control.seeds:
        return None
    left = max(0, len(plan.seeds) - run)
    ending = f"so far ({left} are not run)" if counted + left >= plan.control.seeds else "for good"
    return (
        f"void {ending}: {counted} of {run} runs of the control, {plan.control.variant}, are past "
        f"the gate, and {plan.control.seeds} must be."
    )


def check_rules(plan: Study, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return each rule with both medians and whether it holds.

    That is None where a side was not measured, and for every rule of a study that is void.
    """
    judges = void(plan, rows) is None
    medians = {
        (row["variant"], name): told["median"]
        for row in rows
        for name, told in row["figures"].items()
    }
    known = {name for _, name in medians}
    judged = []
    for rule in plan.rules:
        left, (_, comparison), right = rule_parts(rule)
        for variant, name in (left, right):
            # With every variant measured, a name that none has is a slip of the pen.
            if variant is not None and all(row["counted"] for row in rows) and name not in known:
                raise ConfigError(
                    f"rules names {name}, which is not a figure ({_some(known)}). Correct it."
                )
        here, there = (
            float(name) if variant is None else medians.get((variant, name))
            for variant, name in (left, right)
        )
        holds = None
        if judges and here is not None and there is not None:
            holds = bool(COMPARISONS[comparison](here, there))
        judged.append({"rule": rule, "left": here, "right": there, "holds": holds})
    return judged


def _some(names: set[str]) -> str:
    few = sorted(names)[:6]
    return ", ".join(few) + (", …" if len(names) > len(few) else "")
