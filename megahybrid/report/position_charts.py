"""Held-out loss by position, before and after each stage, and at multiples of the length."""

import math
from collections.abc import Sequence
from typing import Any

from megahybrid.report.evaluation_files import EvaluationFile
from megahybrid.report.figures import (
    FAINT,
    SYMBOLS,
    Figure,
    axis,
    colour,
    context_axis,
    layout,
    line,
    short_tokens,
)
from megahybrid.report.parts import Chart, Missing, Part, Table
from megahybrid.report.record import Evaluation, RunRecord
from megahybrid.report.statistics import joined_buckets

TIMES = (1, 2, 4, 8)


def position_parts(
    records: Sequence[RunRecord], results: Sequence[list[EvaluationFile]]
) -> list[Part]:
    """Curves for each stage of each run and set, then the loss at multiples of its length."""
    parts: list[Part] = _compared(records) if len(records) > 1 else []
    for record in records:
        sets = [name for name in record.held_out_sets() if record.at_stage_ends(name)]
        if len(records) == 1:
            for held_out in sets:
                parts += _before_and_after(record, held_out)
        if not sets:
            parts.append(
                Missing(
                    f"loss by position ({record.name})",
                    "no stage has ended yet, or the run names no held-out set",
                    "data.held_out: {NAME: {path: …}} in the run file",
                )
            )
    if turns := [row for record in records for row in _turn_rows(record)]:
        head = ("run", "set", "stage", "turn of the assistant", "targets", "loss")
        parts.append(Table(head, turns, "Held-out conversations, by turn"))
    if any(record.evaluations for record in records):
        parts.append(_multiples(records))
    rows: list[list[Any]] = []
    for record, mine in zip(records, results, strict=True):
        reaches = [one for one in mine if one.kind == "loss"]
        for one in reaches:
            rows += _reach_rows(record, one)
        if not reaches:
            parts.append(
                Missing(
                    f"rows of up to 8 times the trained length, and a sliding window "
                    f"({record.name})",
                    "the checkpoint was not scored beyond its length",
                    f"megahybrid evaluate {record.directory} --beyond",
                )
            )
    if rows:
        head = ("run", "held-out set", "shown at once", "tokens", "loss", "perplexity")
        parts.append(Table(head, rows, "Loss by how much is shown at once"))
    return parts


def _reach_rows(record: RunRecord, file: EvaluationFile) -> list[list[Any]]:
    trained = file.result["trained_length"]
    shown = {
        f"rows of {int(length):,} ({int(length) / trained:g}×)": scores
        for length, scores in file.result["rows"].items()
    }
    shown[f"a sliding window of {trained:,}"] = file.result["sliding"]
    return [
        [record.name, name, words, score["tokens"], score["loss"], score["perplexity"]]
        for words, scores in shown.items()
        for name, score in scores.items()
    ]


def _before_and_after(record: RunRecord, held_out: str) -> list[Part]:
    """A small chart for each stage; all share their axes, so that eyes can go from one to next."""
    evaluations = record.at_stage_ends(held_out)
    curves = [_curve(one) for one in evaluations]
    known = [loss for curve in curves for loss in curve[1] if loss is not None]
    longest = max(bucket.stop for one in evaluations for bucket in one.by_position)
    low, high = min(known, default=0.0), max(known, default=1.0)
    margin = 0.06 * (high - low or 1)
    chance = math.log(record.config.model.vocab_size) if record.config else None
    parts: list[Part] = []
    for number, (one, curve) in enumerate(zip(evaluations, curves, strict=True)):
        data = []
        if number:
            before = curves[number - 1]
            data.append(_line(before, f"before: after {evaluations[number - 1].stage}", FAINT,
                              "dash", SYMBOLS[1]))  # fmt: skip
        data.append(_line(curve, f"after {one.stage}", colour(number), "solid", SYMBOLS[0]))
        x_axis = context_axis(longest) | {"range": [0, math.log10(longest)]}
        y_axis = axis("loss, nats per token", range=[low - margin, high + margin])
        plan = layout(x_axis, y_axis, height=320)
        trained = next((s.longest for s in record.stages if s.name == one.stage), None)
        if trained:
            plan |= _mark(trained, "trained to")
        before_words = "The dashed line is the same before the stage." if number else (
            f"Before it, an untrained model: ln(vocabulary) = {chance:.2f} at every position."
            if chance else "")  # fmt: skip
        says = (
            f"Held-out text “{held_out}” after stage {one.stage}: loss of a token by how many "
            f"tokens came before it in its document. {before_words} Right of the mark the model "
            "never saw so much context in training."
        )
        name = f"position-{record.slug}-{held_out}-{number}"
        parts.append(
            Chart(name, f"{held_out} · stage {one.stage}", says, {"data": data, "layout": plan},
                  _buckets_table(one))
        )  # fmt: skip
    return parts


def _turn_rows(record: RunRecord) -> list[list[Any]]:
    """The loss of each turn at the end of each stage, of the sets that are conversations."""
    return [
        [record.name, held_out, one.stage, turn.turn, turn.tokens, turn.loss]
        for held_out in record.held_out_sets()
        for one in record.at_stage_ends(held_out)
        for turn in one.by_turn
    ]


def _compared(records: Sequence[RunRecord]) -> list[Part]:
    """For each set the last curve of every run on one chart, then what each stage did to a run."""
    parts: list[Part] = []
    names = [name for record in records for name in record.held_out_sets()]
    for held_out in dict.fromkeys(names):
        last = [(r, r.at_stage_ends(held_out)[-1]) for r in records if r.at_stage_ends(held_out)]
        data = [
            _line(_curve(one), record.name, colour(number), "solid", SYMBOLS[number % 6])
            for number, (record, one) in enumerate(last)
        ]
        longest = max(bucket.stop for _, one in last for bucket in one.by_position)
        plan = layout(context_axis(longest), axis("loss, nats per token"), height=380)
        parts.append(
            Chart(f"position-all-{held_out}", f"{held_out} · all runs",
                  f"Held-out text “{held_out}” after each run's last scored stage: loss of a token "
                  "by how many tokens came before it in its document.",
                  {"data": data, "layout": plan}),
        )  # fmt: skip
        parts += [_stages(record, held_out) for record, _ in last]
    return parts


def _stages(record: RunRecord, held_out: str) -> Chart:
    """Draw the curves of a run after each of its stages."""
    evaluations = record.at_stage_ends(held_out)
    data = [
        _line(_curve(one), f"after {one.stage}", colour(number), "solid", SYMBOLS[number % 6])
        for number, one in enumerate(evaluations)
    ]
    longest = max(bucket.stop for one in evaluations for bucket in one.by_position)
    plan = layout(context_axis(longest), axis("loss, nats per token"), height=320)
    trained = max(stage.longest for stage in record.stages)
    says = (
        f"{record.name} on “{held_out}” after each of its stages. Right of the mark the model "
        "never saw so much context in training."
    )
    return Chart(
        f"position-{record.slug}-{held_out}", f"{record.name}: {held_out}, by stage", says,
        {"data": data, "layout": plan | _mark(trained, "trained to")},
        _buckets_table(evaluations[-1]),
    )  # fmt: skip


def _multiples(records: Sequence[RunRecord]) -> Part:
    """Loss of positions between half of a length and the length, for 1, 2, 4 and 8 times the
    length that the stage was trained at."""
    rows: list[list[Any]] = []
    for record in records:
        for held_out in record.held_out_sets():
            for one in record.at_stage_ends(held_out):
                trained = next((s.longest for s in record.stages if s.name == one.stage), None)
                if trained:
                    losses = [loss_at(one, trained * times) for times in TIMES]
                    rows.append([record.name, held_out, one.stage, trained, *losses])
    head = ("run", "held-out set", "after stage", "trained length (1×)",
            *(f"loss at {times}×" for times in TIMES))  # fmt: skip
    return Table(
        head, rows,
        "Loss at 1, 2, 4 and 8 times the trained length (the farther half of the positions up to "
        "it; a dash: not measured, or no document is so long)",
    )  # fmt: skip


def loss_at(one: Evaluation, length: int) -> float | None:
    """Return the mean loss of positions [length/2, length), where a whole bucket is so far."""
    inside = [
        (bucket, bucket.loss)
        for bucket in one.by_position
        if bucket.loss is not None
        and bucket.start >= length // 2
        and bucket.stop <= length
        and bucket.stop > length // 2
    ]
    tokens = sum(bucket.tokens for bucket, _ in inside)
    if not inside or max(bucket.stop for bucket, _ in inside) < length:
        return None
    return sum(loss * bucket.tokens for bucket, loss in inside) / tokens


def _curve(one: Evaluation) -> tuple[list[float], list[float | None], list[str]]:
    """Geometric middle of each bucket's contexts, its loss, and the bucket in words."""
    buckets = joined_buckets(one.by_position)
    return (
        [((b.start + 1) * b.stop) ** 0.5 for b in buckets],
        [b.loss for b in buckets],
        [f"{b.start:,}–{b.stop - 1:,}, {b.tokens:,} targets" for b in buckets],
    )


def _line(
    curve: tuple[list[float], list[float | None], list[str]],
    name: str,
    ink: str,
    dash: str,
    symbol: str,
) -> Figure:
    x, y, words = curve
    return line(x, y, name, colour=ink, dash=dash, markers=symbol, text=words,
                hovertemplate="%{y:.4f} (%{text})")  # fmt: skip


def _mark(length: int, words: str) -> Figure:
    """A line at a length on a logarithmic axis of contexts."""
    return {
        "shapes": [{
            "type": "line", "xref": "x", "yref": "paper", "x0": length, "x1": length, "y0": 0,
            "y1": 1, "line": {"color": FAINT, "width": 1.5, "dash": "dot"},
        }],
        "annotations": [{
            "text": f"{words} {short_tokens(length)}", "x": math.log10(length), "xref": "x",
            "y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False,
            "xanchor": "right", "font": {"size": 11},
        }],
    }  # fmt: skip


def _buckets_table(one: Evaluation) -> Table:
    rows: list[list[Any]] = [
        [bucket.start, bucket.stop - 1, bucket.tokens, bucket.loss] for bucket in one.by_position
    ]
    return Table(("from position", "to position", "targets", "loss"), rows)
