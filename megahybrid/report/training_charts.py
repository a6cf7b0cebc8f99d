"""Charts over the tokens of a run: loss, learning rate, throughput, gradient norm, wall time."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megahybrid.ledger import StepLine
from megahybrid.report.figures import (
    DASHES,
    FAINT,
    SYMBOLS,
    axis,
    colour,
    layout,
    line,
    log_axis,
    running_mean,
    stage_bands,
    thinned,
    token_axis,
)
from megahybrid.report.parts import Chart, Missing, Part, Table
from megahybrid.report.record import RunRecord
from megahybrid.train.metrics import PHASES

Records = Sequence[RunRecord]
KIND_NAMES = {"mlp": "MLP"}
SPENT = (*PHASES, "other")


def training_parts(records: Records) -> list[Part]:
    """Every chart over tokens that the runs have numbers for."""
    return [
        _loss(records),
        _learning_rate(records),
        _throughput(records),
        *(_gradient_norm(record, len(records) > 1) for record in records),
        _seconds(records),
        _progress(records),
    ]


def _name(record: RunRecord, records: Records, what: str) -> str:
    return f"{record.name}: {what}" if len(records) > 1 else what


def _loss(records: Records) -> Part:
    data, together = [], 1
    several = len(records) > 1
    for number, record in enumerate(records):
        tokens, values = record.column("tokens"), record.column("loss")
        ink = colour(number if several else 0)
        x, y, together = thinned(tokens, values)
        if not several:
            data.append(line(x, y, "each step", colour=ink, width=1, opacity=0.3, hoverinfo="skip"))
        x, y, _ = thinned(tokens, running_mean(values))
        name = _name(record, records, "training")
        data.append(line(x, y, name, colour=ink, hovertemplate="%{y:.4f}"))
        for place, held_out in enumerate(record.held_out_sets()):
            scored = [one for one in record.scores(held_out, "stream") if one.loss is not None]
            data.append(
                line(
                    [one.run_tokens for one in scored],
                    [one.loss for one in scored],
                    _name(record, records, f"held out: {held_out}"),
                    colour=ink if several else colour(place + 1),
                    dash=DASHES[(place + 1) % len(DASHES)],
                    markers=SYMBOLS[place % len(SYMBOLS)],
                    hovertemplate="%{y:.4f}",
                )
            )
    figure = {
        "data": data,
        "layout": layout(
            token_axis(records), axis("loss, nats per token"), height=400, **stage_bands(records)
        ),
    }
    smooth = "The bold line is the mean of 2 % of the steps around each. "
    if together > 1:
        smooth += f"Each point stands for {together} steps. "
    says = (
        smooth + "Held-out text was never trained on. A loss of 0 would be certainty; one nat less "
        "means the right token became 2.7 times as likely."
    )
    return Chart("loss", "Loss", says, figure, _held_out_table(records))


def _held_out_table(records: Records) -> Table:
    rows: list[list[Any]] = [
        [record.name, one.held_out, one.stage, one.step, one.run_tokens, one.length, one.loss]
        for record in records
        for held_out in record.held_out_sets()
        for one in record.scores(held_out, "stream")
    ]
    head = ("run", "held-out set", "stage", "step", "tokens seen", "row length", "loss")
    return Table(head, rows, "Held-out loss")


def _learning_rate(records: Records) -> Part:
    data = []
    for number, record in enumerate(records):
        x, y, _ = thinned(record.column("tokens"), record.column("learning_rate"))
        name = _name(record, records, "learning rate")
        data.append(line(x, y, name, colour=colour(number), hovertemplate="%{y:.3e}"))
    y_axis = axis("learning rate", rangemode="tozero", exponentformat="power")
    plan = layout(token_axis(records), y_axis, **stage_bands(records))
    plan["showlegend"] = len(records) > 1
    return Chart(
        "learning-rate", "Learning rate",
        "How far each update may move the weights, as each stage's recipe sets it.",
        {"data": data, "layout": plan},
    )  # fmt: skip


def _throughput(records: Records) -> Part:
    data, highest = [], 0.0
    several = len(records) > 1
    for number, record in enumerate(records):
        tokens, speeds = record.column("tokens"), record.column("tokens_per_second")
        if np.isnan(speeds).all():
            continue
        x, y, _ = thinned(tokens, speeds)
        if not several:
            data.append(line(x, y, "each step", colour=colour(0), width=1, opacity=0.45,
                             hovertemplate="%{y:,.0f}"))  # fmt: skip
        medians, begin = [], 0
        for stage in record.stages:
            part = speeds[begin : begin + len(stage.steps)]
            begin += len(stage.steps)
            medians.append(None if np.isnan(part).all() else float(np.nanmedian(part)))
        xs = [edge for stage in record.stages for edge in (stage.begin, stage.end, None)]
        ys = [value for median in medians for value in (median, median, None)]
        data.append(
            line(xs, ys, _name(record, records, "median of the stage"),
                 colour=colour(number if several else 1), width=3, hovertemplate="%{y:,.0f}")
        )  # fmt: skip
        # One stalled step must not flatten all others against the axis.
        highest = max(highest, 1.25 * float(np.nanquantile(speeds, 0.98)))
    if not data:
        return Missing("throughput", "no step says how long it took")
    y_axis = axis("tokens per second", range=[0, highest])
    figure = {"data": data, "layout": layout(token_axis(records), y_axis, **stage_bands(records))}
    shares = [s for record in records for s in record.column("mfu").tolist() if s == s]
    says = "Tokens that all ranks together train on in a second, saving and evaluating left out. "
    if shares:
        says += f"The median step used {np.median(shares):.1%} of the devices' peak."
    else:
        says += "No share of a peak is given: there is no published one for this device."
    return Chart("throughput", "Throughput", says, figure)


def _gradient_norm(record: RunRecord, several: bool) -> Part:
    tokens, norms = record.column("tokens"), record.column("gradient_norm")
    kinds = list(dict.fromkeys(kind for one in record.steps for kind in one.gradient_norm_by_kind))
    name = f"gradient-norm-{record.slug}" if several else "gradient-norm"
    title = f"Gradient norm: {record.name}" if several else "Gradient norm by kind of layer"
    if np.isnan(norms).all():
        return Missing(title, "no step has one")
    data = []
    for index, kind in enumerate(kinds, start=1):
        values = [one.gradient_norm_by_kind.get(kind) or np.nan for one in record.steps]
        if np.isnan(values).all():  # a tied head has no gradient of its own
            continue
        x, y, _ = thinned(tokens, running_mean(np.array(values)))
        label = KIND_NAMES.get(kind, kind.replace("_", " "))
        data.append(line(x, y, label, colour=colour(index), width=1.6, hovertemplate="%{y:.3g}",
                         dash=DASHES[index // 6 % 4]))  # fmt: skip
    x, y, _ = thinned(tokens, running_mean(norms))
    data.append(line(x, y, "all parameters", colour=colour(0), width=3, hovertemplate="%{y:.3g}"))
    clip = record.config.optimizer.clip_norm if record.config else None
    if clip is not None:
        data.append(line([record.stages[0].begin, record.stages[-1].end], [clip, clip],
                         f"clipped above {clip:g}", colour=FAINT, dash="dash", width=1.2,
                         hoverinfo="skip"))  # fmt: skip
    y_axis = log_axis("gradient norm", [value for one in data for value in one["y"]])
    plan = layout(token_axis([record]), y_axis, height=380, **stage_bands([record]))
    says = (
        "Size of the gradient before clipping, means of 2 % of the steps. A kind that rises alone "
        "tells where training strains."
    )
    return Chart(name, title, says, {"data": data, "layout": plan})


def _seconds(records: Records) -> Part:
    """Seconds of each stage by what they went into, one bar a stage."""
    labels: list[str] = []
    sums: list[dict[str, float]] = []
    for record in records:
        for stage in record.stages:
            labels.append(_name(record, records, stage.name))
            sums.append({
                phase: sum(step.seconds.get(phase, 0.0) for step in stage.steps)
                for phase in SPENT
            })  # fmt: skip
    data = [
        {
            "type": "bar", "orientation": "h", "y": labels, "name": phase.replace("_", " and "),
            "x": [float(f"{one[phase]:.5g}") for one in sums],
            "marker": {"color": colour(index)}, "hovertemplate": "%{x:,.1f} s",
        }
        for index, phase in enumerate(SPENT)
        if any(one[phase] for one in sums)
    ]  # fmt: skip
    if not data:
        return Missing("where the time went", "no step says how its seconds were spent")
    plan = layout(axis("seconds"), {"autorange": "reversed"}, barmode="stack", hovermode="closest")
    plan["height"] = 190 + 34 * len(labels)
    rows: list[list[Any]] = [
        [label, *(round(one[phase], 2) for phase in SPENT)]
        for label, one in zip(labels, sums, strict=True)
    ]
    return Chart(
        "seconds", "Where the time went",
        "Wall seconds of rank 0 in each stage. Waiting for data, saving and evaluating should be "
        "slivers.",
        {"data": data, "layout": plan},
        Table(("stage", *(p.replace("_", " ") for p in SPENT)), rows),
    )  # fmt: skip


def _progress(records: Records) -> Part:
    """Tokens over wall time with every attempt, so that lost work shows."""
    data = []
    for number, record in enumerate(records):
        every = [one for one in record.every_line if isinstance(one, StepLine)]
        began = every[0].time_unix
        for attempt in sorted({one.attempt for one in every}):
            mine = [one for one in every if one.attempt == attempt]
            x, y, _ = thinned(
                np.array([one.time_unix - began for one in mine]),
                np.array([one.tokens for one in mine], dtype=float),
            )
            data.append(
                line([second / 60 for second in x if second is not None], y,
                     _name(record, records, f"attempt {attempt}"),
                     colour=colour(number if len(records) > 1 else attempt - 1),
                     dash=DASHES[(attempt - 1) % 4], hovertemplate="%{y:,.0f} tokens")
            )  # fmt: skip
    plan = layout(axis("minutes since the first step"), axis("tokens seen", exponentformat="B"))
    return Chart(
        "progress", "Tokens over wall time",
        "One line for each attempt. Where a line begins lower than the one before it ended, work "
        "since the last checkpoint was done again.",
        {"data": data, "layout": plan},
    )  # fmt: skip


def stage_table(records: Records) -> Table:
    """Return a row for each stage of each run."""
    rows: list[list[Any]] = []
    for record in records:
        for stage in record.stages:
            tail = stage.steps[-max(1, len(stage.steps) // 10) :]
            losses = [one.loss for one in tail if one.loss is not None]
            speeds = [one.tokens_per_second for one in stage.steps if one.tokens_per_second]
            shares = [one.mfu for one in stage.steps if one.mfu is not None]
            rows.append([
                record.name, stage.name, ", ".join(f"{n:,}" for n in stage.lengths),
                stage.end - stage.begin, len(stage.steps), stage.steps[0].learning_rate,
                stage.steps[-1].learning_rate, float(np.mean(losses)) if losses else None,
                float(np.median(speeds)) if speeds else None,
                100 * float(np.median(shares)) if shares else None,
            ])  # fmt: skip
    head = ("run", "stage", "row lengths", "tokens", "steps", "first rate", "last rate",
            "last training loss", "tokens/s", "MFU %")  # fmt: skip
    return Table(head, rows, "Stages")
